"""Removes shared-memory files that vLLM leaves behind.

Tensor-parallel ranks on a CPU communicate through files in /dev/shm whose names repeat from run to run. vLLM does not
remove them when it is closed or killed, and the next start then fails with errno 17 (file exists).
"""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
PATTERN = "*cpushm*"


def remove_leftovers() -> None:
    """Before a start: remove and log the files that killed engines left behind."""
    for file in remove_unused():
        logger.info("removed %s, left behind by a killed vLLM process", file)


def remove_unused() -> list[Path]:
    """Remove vLLM's shared-memory files that no process on this machine has mapped; returns the removed files."""
    files = list(FOLDER.glob(PATTERN))
    removed: list[Path] = []
    used = _mapped_files() if files else set()
    for file in files:
        if str(file) in used:
            continue
        try:
            file.unlink()
        except FileNotFoundError:
            continue  # another rank removed it
        except PermissionError:
            logger.warning("%s was left by another user's vLLM; if the start fails with errno 17, remove it", file)
            continue
        removed.append(file)
    return removed


def _mapped_files() -> set[str]:
    """Files in `FOLDER` that some process has mapped."""
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            continue  # the process ended, or belongs to another user, whose files cannot be removed anyway
        used.update(line[line.index("/") :] for line in lines if f"{FOLDER}/" in line)
    return used
