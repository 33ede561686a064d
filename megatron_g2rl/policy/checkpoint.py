"""Saves and resumes the policy through megatron.core.dist_checkpointing, in a form that any layout can load.

A checkpoint is a folder `step_00000020`: Megatron's shards (weights, optimizer, schedule) and `trainer.json`, what the
loop needs to go on. It is written under another name and renamed when it is complete: a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from megatron_g2rl.errors import UserError
from megatron_g2rl.policy.model import unwrap
from megatron_g2rl.policy.optimizer import Optimizer

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
_FOLDER = re.compile(r"step_(\d{8})$")


class CheckpointError(UserError):
    """A checkpoint cannot be read or written."""


def check(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files are missing, cut off or unreadable, without reading the tensors.

    Raises:
        CheckpointError: names the file and what to do.
    """
    try:
        json.loads((checkpoint / "trainer.json").read_text())
        shards = FileSystemReader(checkpoint).read_metadata().storage_data.values()
        needed: dict[str, int] = {}
        for shard in shards:
            needed[shard.relative_path] = max(needed.get(shard.relative_path, 0), shard.offset + shard.length)
        for name, size in needed.items():
            if (checkpoint / name).stat().st_size < size:
                raise EOFError(f"{name} is cut off: {(checkpoint / name).stat().st_size} of {size} bytes")
    except Exception as error:  # a broken pickle can raise anything
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} cannot be read ({type(error).__name__}: {error}): remove this folder, and the same command goes "
        "on from the one before it, or from the start when there is none; another run.name starts anew beside it"
    )


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    found = sorted(p for p in folder.glob("step_*") if _FOLDER.match(p.name) and (p / "trainer.json").is_file())
    return found[-1] if found else None


def _state(optimizer: Optimizer, *, loading: bool) -> dict:
    models = [unwrap(chunk) for chunk in optimizer.chunks]
    keys = ["model"] if len(models) == 1 else [f"model{i}" for i in range(len(models))]
    state = {key: model.sharded_state_dict(metadata=_METADATA) for key, model in zip(keys, models, strict=True)}
    weights = state["model"] if len(models) == 1 else {k: state[k] for k in keys}
    state["optimizer"] = optimizer.megatron.sharded_state_dict(weights, is_loading=loading, metadata=_METADATA)
    state["schedule"] = optimizer.schedule.state_dict()
    return state


def save(folder: Path, step: int, optimizer: Optimizer, trainer_state: dict, keep: int) -> Path:
    """Write a checkpoint; a collective.

    Args:
        folder: the run's checkpoint folder.
        step: steps finished.
        optimizer: holds the model chunks too.
        trainer_state: JSON-serialisable state of the loop, the same on every rank.
        keep: how many checkpoints stay.

    Returns:
        The finished checkpoint's folder.

    Raises:
        CheckpointError: a file cannot be written; older checkpoints are as they were.
    """
    final, partial = folder / f"step_{step:08d}", folder / f".partial_step_{step:08d}"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    strategy = get_default_save_sharded_strategy("torch_dist")
    try:
        dist_checkpointing.save(_state(optimizer, loading=False), str(partial), sharded_strategy=strategy)
    except (CheckpointException, OSError, RuntimeError) as error:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(
            f"the checkpoint of step {step} cannot be written to {folder} ({reason}): free disk space there, and the "
            "same command goes on from the last checkpoint before it"
        ) from error
    dist.barrier()
    if first:
        (partial / "trainer.json").write_text(json.dumps(trainer_state, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        complete = sorted(p for p in folder.glob("step_*") if _FOLDER.match(p.name))
        for old in complete[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(checkpoint: Path, optimizer: Optimizer) -> dict:
    """Restore weights, optimizer and schedule from a checkpoint of any layout; a collective.

    Returns:
        The trainer state that was saved with it.
    """
    state = dist_checkpointing.load(
        _state(optimizer, loading=True),
        str(checkpoint),
        sharded_strategy=get_default_load_sharded_strategy(str(checkpoint)),
    )
    models = [unwrap(chunk) for chunk in optimizer.chunks]
    for i, model in enumerate(models):
        model.load_state_dict(state["model" if len(models) == 1 else f"model{i}"])
    optimizer.load_state_dict(state["optimizer"], state["schedule"])
    return read_state(checkpoint)


def read_state(checkpoint: Path) -> dict:
    """What was saved beside Megatron's shards, as it was given to `save`."""
    return json.loads((checkpoint / "trainer.json").read_text())
