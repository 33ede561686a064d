"""Measures the time of parts of a computation without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceTimer:
    """Accumulates seconds per named part: with a clock on a CPU, with CUDA events on a GPU; only `read` waits.

    On a GPU a part is measured from when the device starts it to when the device completes it. Time between parts is
    not counted, so the sum is a lower bound of their total time.
    """

    def __init__(self, device: torch.device):
        """Measure work on `device`."""
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, object, object]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time of the enclosed block to `name`; a block that raises is not counted."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def read(self) -> dict[str, float]:
        """Return the seconds per name so far, and reset; waits for the device."""
        spans, self._spans = self._spans, []
        if self._on_gpu and spans:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in spans:
            elapsed = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
            seconds[name] = seconds.get(name, 0.0) + elapsed
        return seconds

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
