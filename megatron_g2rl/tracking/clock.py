"""Seconds that each phase of a step takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up the seconds of each phase; phases may lie inside one another."""

    def __init__(self, on_phase: Callable[[str | None], None] = lambda name: None):
        """Start with nothing counted.

        Args:
            on_phase: called with the innermost phase that runs now, None when none does.
        """
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._on_phase = on_phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to `name`."""
        start = time.perf_counter()
        self._running.append(name)
        self._on_phase(name)
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self._running.pop()
            self._on_phase(self._running[-1] if self._running else None)

    def read(self) -> dict[str, float]:
        """`time/PHASE_s` of every phase, and start again."""
        seconds, self.seconds = self.seconds, {}
        return {f"time/{name}_s": value for name, value in seconds.items()}
