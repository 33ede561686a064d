"""Names on which programs agree: files of a run, a checkpoint and a model folder, and an exit code.

The launcher's `attempts.sh` and `rank.sh`, which need no Python, repeat `MANIFEST` and `STOPPED`; a test compares them.
"""

from __future__ import annotations

from pathlib import Path

MANIFEST = "manifest.json"
"""Sizes and checksums of a checkpoint or a converted model, written last: without it, the folder is incomplete."""
MEGATRON = "megatron"
"""Subfolder of a Megatron folder (a converted model, or a checkpoint of a run) with the torch_dist files."""
TRAINER_STATE = "trainer.json"
"""File of a checkpoint with what the training loop needs to resume."""
WARM_START_RECORD = "warm_start.json"
"""File of a model that `g2rl warm-start` created, with the settings that determine its weights."""
STOPPED = 75
"""Exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL: try again later)."""


def is_megatron_folder(folder: str | Path) -> bool:
    """Whether a folder has its weights in Megatron's format."""
    return (Path(folder) / MEGATRON).is_dir()
