"""Seconds of parts of a computation, measured inside it without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceTimer:
    """Adds up the seconds of named parts: CUDA events on a GPU, so that nothing waits until `read`; a clock on a CPU.

    On a GPU a part counts from when the device reaches it to when it is through with it. What lies between two parts
    is not counted, so the sum is a lower bound of what they cost together.
    """

    def __init__(self, device: torch.device):
        """Measure work on `device`."""
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, object, object]] = []

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what is done inside as `name`; what raises does not count."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each name so far, and start again; waits for the device."""
        spans, self._spans = self._spans, []
        if self._on_gpu and spans:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in spans:
            passed = start.elapsed_time(end) / 1000 if self._on_gpu else end - start
            seconds[name] = seconds.get(name, 0.0) + passed
        return seconds

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
