"""`g2rl examples [DIR]`: copies the example configurations, which the wheel carries too, to a folder of the user's."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_g2rl.config.shipped import shipped
from megatron_g2rl.errors import UserError

SOURCES = {"examples": ".", "launch/clusters": "clusters", "launch/sweeps": "sweeps"}
"""Shipped folders that are copied, and where to in the user's folder."""
SUFFIXES = (".yaml", ".py")


def copy_examples(folder: Path) -> list[Path]:
    """Copy the examples into `folder`, which is created if needed, and return the files that were written.

    Raises:
        UserError: one of the files exists (nothing is written then), or the folder cannot be written.
    """
    copies = {
        folder / place / file.relative_to(shipped(name)): file
        for name, place in SOURCES.items()
        for file in sorted(shipped(name).rglob("*"))
        if file.suffix in SUFFIXES
    }
    present = [target for target in copies if target.exists()]
    if present:
        raise UserError(
            f"{present[0]} exists, as {len(present)} of {len(copies)} example files do; nothing was written. "
            "Name another folder: g2rl examples DIR"
        )
    try:
        for target, file in copies.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; name another folder") from error
    return list(copies)
