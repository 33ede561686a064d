"""`g2rl examples [DIR]`: copies the example configurations, which are also in the wheel, to a folder of the user."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_g2rl.config.shipped import shipped
from megatron_g2rl.errors import UserError

SOURCES = {"examples": ".", "launch/clusters": "clusters", "launch/sweeps": "sweeps"}
"""Shipped folders to copy, and their names in the target folder."""
SUFFIXES = (".yaml", ".py")


def copy_examples(folder: Path) -> list[Path]:
    """Copy the examples into `folder`, which is created if needed, and return the written files.

    Raises:
        UserError: one of the files already exists (then nothing is written), or the folder cannot be written.
    """
    copies = {
        folder / subfolder / file.relative_to(shipped(name)): file
        for name, subfolder in SOURCES.items()
        for file in sorted(shipped(name).rglob("*"))
        if file.suffix in SUFFIXES
    }
    present = [target for target in copies if target.exists()]
    if present:
        raise UserError(
            f"{present[0]} already exists ({len(present)} of {len(copies)} example files do); nothing was written. "
            "Name another folder: g2rl examples DIR"
        )
    try:
        for target, file in copies.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; name another folder") from error
    return list(copies)
