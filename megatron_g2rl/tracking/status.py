"""status.json: where a run is right now, for people, launchers and watchdogs that look from outside."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path


class Status:
    """The one line of status.json, rewritten at every change of phase; a reader never sees half of it."""

    def __init__(self, folder: Path):
        """Write to `folder`/status.json."""
        self.path, self.step = folder / "status.json", 0

    def write(self, phase: str | None, step: int | None = None) -> None:
        """Say what the run does now.

        Args:
            phase: name of the phase; None between two.
            step: steps finished; None: as before.
        """
        self.step = self.step if step is None else step
        partial = self.path.with_name("status.json.partial")
        partial.write_text(
            json.dumps({"step": self.step, "phase": phase, "time": time.time(), "pid": os.getpid()}) + "\n"
        )
        os.replace(partial, self.path)
