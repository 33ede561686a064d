"""`g2rl examples [DIR]`: copies the example configurations, which the wheel carries too, to a folder of the user's."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_g2rl.config.shipped import shipped
from megatron_g2rl.errors import UserError

SUFFIXES = (".yaml", ".py")


def copy_examples(folder: Path) -> list[Path]:
    """Copy the examples into `folder`, which is created if needed, and return the files that were written.

    Raises:
        UserError: one of the files exists (nothing is written then), or the folder cannot be written.
    """
    source = shipped("examples")
    files = sorted(file for file in source.rglob("*") if file.suffix in SUFFIXES)
    targets = [folder / file.relative_to(source) for file in files]
    present = [target for target in targets if target.exists()]
    if present:
        raise UserError(
            f"{present[0]} exists, as {len(present)} of {len(targets)} example files do; nothing was written. "
            "Name another folder: g2rl examples DIR"
        )
    try:
        for file, target in zip(files, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; name another folder") from error
    return targets
