"""status.json: the current state of a run, for users, launchers and watchdogs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


class Status:
    """Writer of status.json, a single line that is replaced atomically on every phase change."""

    def __init__(self, folder: Path):
        """Write to `folder`/status.json."""
        self.path, self.step = folder / "status.json", 0
        self.health: list[str] = []
        """Sentences on what deserves attention (`tracking/health.py`), written with every phase."""

    def write(self, phase: str | None, step: int | None = None) -> None:
        """Write the current phase.

        Args:
            phase: name of the phase; None between two phases.
            step: finished steps; None: unchanged.
        """
        self.step = self.step if step is None else step
        partial = self.path.with_name("status.json.partial")
        content = {"step": self.step, "phase": phase, "time": time.time(), "pid": os.getpid()}
        partial.write_text(json.dumps(content | {"health": "; ".join(self.health)}) + "\n")
        os.replace(partial, self.path)
