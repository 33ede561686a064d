"""Finds pipes, sockets and devices, which would block or never end when read as a file."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path


def pipes(folder: Path) -> Iterator[Path]:
    """Pipes and sockets directly in a folder: opening one waits for another process."""
    return (path for path, mode in _entries(folder) if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))


def special_files(folder: Path) -> Iterator[Path]:
    """Entries of a folder that are neither regular files nor folders; links are followed."""
    return (path for path, mode in _entries(folder) if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)))


def _entries(folder: Path) -> Iterator[tuple[Path, int]]:
    """Entries of a folder with their modes; nothing if there is no such folder. Dangling links are skipped."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        try:
            yield path, path.stat().st_mode
        except OSError:  # a dangling link, or a link to itself
            continue
