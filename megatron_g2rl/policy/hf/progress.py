"""Shows the progress of a conversion: a bar on a terminal, otherwise a log line at every 10%."""

from __future__ import annotations

import logging
import time

import rich.progress
from rich.console import Console
from torch import Tensor

log = logging.getLogger(__name__)


class Progress:
    """Counts processed bytes; a context manager."""

    def __init__(self, total: int):
        """Start counting.

        Args:
            total: number of bytes to process.
        """
        self.total, self.done, self.logged_tenth, self.start = total, 0, 0, time.monotonic()
        self.name = ""
        console = Console(stderr=True)
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        self.bar = rich.progress.Progress(*columns, console=console) if console.is_terminal else None
        self.task = self.bar.add_task("", total=total) if self.bar else None

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar:
            self.bar.stop()

    def phase(self, name: str) -> None:
        """Set the description of the current phase."""
        self.name = name
        if self.bar:
            self.bar.update(self.task, description=name)

    def passed(self, tensor: Tensor) -> Tensor:
        """Count a tensor and return it."""
        self.advance(tensor.nbytes)
        return tensor

    def advance(self, count: int) -> None:
        """Count bytes."""
        self.done += count
        if self.bar:
            self.bar.advance(self.task, count)
            return
        tenth = 10 * self.done // max(self.total, 1)
        if tenth > self.logged_tenth:
            self.logged_tenth = tenth
            seconds = time.monotonic() - self.start
            log.info("%3d%% of %.2f GB in %.0f s: %s", 10 * tenth, self.total / 1e9, seconds, self.name)
