"""Time of each phase of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Accumulates the seconds of each phase; phases may be nested."""

    def __init__(self, on_phase: Callable[[str | None], None] = lambda name: None):
        """Start with zero for every phase.

        Args:
            on_phase: called with the innermost running phase on every change; None when no phase is running.
        """
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._on_phase = on_phase

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside the context to `name`."""
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
        """Return `time/PHASE_s` of every phase and reset."""
        seconds, self.seconds = self.seconds, {}
        return {f"time/{name}_s": value for name, value in seconds.items()}
