"""Finds what would block or never end when it is read as a file: pipes, sockets and devices."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path


def pipes(folder: Path) -> Iterator[Path]:
    """Pipes and sockets directly in a folder: opening one waits for another process."""
    return (path for path, mode in _entries(folder) if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))


def special_files(folder: Path) -> Iterator[Path]:
    """What is directly in a folder and is neither a regular file nor a folder; links are followed."""
    return (path for path, mode in _entries(folder) if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)))


def _entries(folder: Path) -> Iterator[tuple[Path, int]]:
    """Everything in a folder with its mode; nothing where there is no folder. Links that lead nowhere are left out."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        try:
            yield path, path.stat().st_mode
        except OSError:  # a link that leads nowhere, or to itself
            continue
