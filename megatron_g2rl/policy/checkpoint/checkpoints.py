"""Finds, verifies and loads the checkpoints of a run; `checkpoint_saving` writes them.

A checkpoint is a Megatron folder `step_00000020`: `megatron/` (megatron.core.dist_checkpointing: weights, optimizer,
schedule, in a form that any layout can load), `trainer.json` (what the loop needs to go on), the model's configuration
and tokenizer, and `manifest.json`, which is written last. It is renamed to its name when it is complete: a reader never
sees half of one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_g2rl.errors import UserError
from megatron_g2rl.policy.checkpoint import manifest
from megatron_g2rl.policy.checkpoint.optimizer_state import (
    MOMENTS,
    digests,
    mismatched_masters,
    read_shards,
    state_prefix,
    state_shards,
)
from megatron_g2rl.policy.checkpoint.safe_pickle import CorruptPickle, check_pickles, load_saved, read_metadata
from megatron_g2rl.policy.checkpoint.state import Expected, expected_tensors, missing_tensors, read_weights
from megatron_g2rl.policy.hf.megatron_folder import MegatronTensors
from megatron_g2rl.policy.model import unwrap
from megatron_g2rl.policy.optimizer import Optimizer

MEGATRON = "megatron"
"""The folder of the torch_dist files in a Megatron folder."""
STATE = "trainer.json"
_FOLDER = re.compile(r"step_(\d{8})$")


class CheckpointError(UserError):
    """A checkpoint cannot be read or written."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint's files are not as they were written."""


def step_folder(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(_FOLDER.match(checkpoint.name)[1])


def complete(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, the oldest first."""
    return sorted(p for p in folder.glob("step_*") if _FOLDER.match(p.name) and (p / manifest.NAME).is_file())


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint in `folder`, or None."""
    return next(reversed(complete(folder)), None)


def resume_hint(folder: Path) -> str:
    """What the command of a run that was cut short does when it is given again, in a sentence without its full stop.

    Args:
        folder: the run's checkpoints.
    """
    if found := latest(folder):
        return f"The same command goes on from step {step_of(found)}, the newest checkpoint ({found})"
    return "There is no checkpoint yet: the same command begins the run again"


def read_state(checkpoint: Path) -> dict:
    """What was saved beside Megatron's shards, as it was given to `Checkpoints.save`."""
    return json.loads((checkpoint / STATE).read_text())


def architecture_signature(checkpoint: Path) -> dict:
    """What the model of a checkpoint is like (`Architecture.facts`).

    Raises:
        CheckpointError: it does not say.
    """
    state = read_state(checkpoint)
    facts = state.get("architecture") if isinstance(state, dict) else None
    if not isinstance(facts, dict):
        remedy = "it was edited or is corrupt; remove it to resume from the previous one"
        raise CheckpointError(f"{checkpoint}: {STATE} has {facts!r:.40} for architecture: {remedy}")
    return facts


T = TypeVar("T")


def on_first_rank(work: Callable[[], T], when: str) -> T:
    """What `work` returns on rank 0, on every rank; a collective.

    Args:
        work: run on rank 0 only.
        when: begins the message when it raises anything but a UserError.

    Raises:
        UserError: raised by `work`, on every rank; anything else becomes a CheckpointError.
    """
    answer: list = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = work()
        except UserError as error:
            answer[1] = error
        except Exception as error:
            answer[1] = CheckpointError(f"{when} ({type(error).__name__}: {error})")
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def check(checkpoint: Path) -> None:
    """Refuse a checkpoint with a missing or cut-off file, or with an unsafe pickle, without reading the tensors.

    Raises:
        CorruptCheckpoint: names the file and the checkpoint before it.
        UnsafePickle: a pickle in it could run code.
    """
    try:
        read_state(checkpoint)
        needed: dict[str, int] = {}
        for shard in read_metadata(checkpoint / MEGATRON).storage_data.values():
            needed[shard.relative_path] = max(needed.get(shard.relative_path, 0), shard.offset + shard.length)
        for name, size in needed.items():
            if (here := (checkpoint / MEGATRON / name).stat().st_size) < size:
                raise EOFError(f"{name} is cut off: {here} of {size} bytes")
        check_pickles(checkpoint / MEGATRON)
    except CorruptPickle as error:
        raise _damaged(checkpoint, [str(error)]) from error
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(checkpoint, [f"{type(error).__name__}: {error}"]) from error


def _damaged(checkpoint: Path, messages: list[str]) -> CorruptCheckpoint:
    before = [p for p in complete(checkpoint.parent) if p.name < checkpoint.name]
    if before:
        remedy = (
            f"{before[-1]} is the finished checkpoint before it: set checkpoint.on_corruption=previous to go on from "
            "there"
        )
    else:
        remedy = "there is no finished checkpoint before it: remove this folder and the same command starts anew"
    return CorruptCheckpoint(f"{manifest.corruption_message(checkpoint, messages)}. {remedy[0].upper()}{remedy[1:]}")


def verify(checkpoint: Path) -> None:
    """Compare every file with its checksum, each rank its share of the bytes, and look into every pickle; a collective.

    Raises:
        CorruptCheckpoint: names the files and what is wrong with them, and the checkpoint before it; on every rank.
        UnsafePickle: the files are as they were written, but a pickle could run code; on every rank.
    """
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, manifest.find_corruption(checkpoint, dist.get_rank(), dist.get_world_size()))
    messages = sorted({message for part in found for message in part})
    if messages:
        raise on_first_rank(lambda: _damaged(checkpoint, messages), f"{checkpoint} is damaged")
    on_first_rank(lambda: check(checkpoint), f"{checkpoint} cannot be read")


@torch.no_grad()
def load(checkpoint: Path, optimizer: Optimizer, *, load_optimizer: bool = True) -> dict:
    """Restore weights, optimizer and schedule from a checkpoint of any layout; a collective.

    Args:
        checkpoint: a Megatron folder.
        optimizer: holds the model chunks too.
        load_optimizer: False: only the weights; the optimizer stays fresh, its master weights follow the weights.

    Returns:
        The trainer state that was saved with it.

    Raises:
        CheckpointError: something that is asked for is not in it; named, on every rank, before a weight is changed. Or
            the optimizer state is not what was saved; on every rank, after weights were changed.
        UnsafePickle: a pickle in it could run code.
    """
    on_first_rank(lambda: check(checkpoint), f"{checkpoint} cannot be read")
    models = [unwrap(chunk) for chunk in optimizer.chunks]
    reader = MegatronTensors(checkpoint)
    common = _require(checkpoint, expected_tensors(models), reader, load_optimizer)
    read_weights(models, reader, masters=load_optimizer)
    if not load_optimizer:
        optimizer.follow_weights()
        return read_state(checkpoint)
    shards, stored = state_shards(optimizer), common["optimizer"].get("digests")
    if stored is None:
        _refuse_shifted(checkpoint, mismatched_masters(shards, reader))
    read_shards(shards, reader)
    if stored is not None:
        loaded = digests(shards)
        on_first_rank(lambda: _refuse_changed(checkpoint, stored, loaded), f"{checkpoint} cannot be verified")
    # Every applied update advances both; earlier versions did not store the optimizer's own count.
    step = common["optimizer"].get("step", common["schedule"]["num_steps"])
    optimizer.restore(step, common["schedule"])
    return read_state(checkpoint)


def _require(checkpoint: Path, expected: dict[str, Expected], reader: MegatronTensors, load_optimizer: bool) -> dict:
    """The state that is the same on every rank, out of a checkpoint that has all tensors of `expected`."""
    metadata = reader.metadata
    if missing := missing_tensors(expected, metadata):
        raise CheckpointError(
            f"{checkpoint} lacks {_listed(missing)}, or has them in another shape: it is of another model; choose "
            "another run.name, or the model that the run began with"
        )
    if not load_optimizer:
        return {}
    path = checkpoint / MEGATRON / "common.pt"
    common = on_first_rank(lambda: load_saved(path), f"{path} cannot be read")
    if problem := wrong_common(common):
        raise CheckpointError(
            f"{path}: {problem}: it was edited or is corrupt; remove the checkpoint {checkpoint.name}"
        )
    missing = [key for key in ("optimizer", "schedule") if not common.get(key)]
    missing += missing_tensors(expected, metadata, [state_prefix(state) for state in MOMENTS])
    if missing:
        raise CheckpointError(
            f"{checkpoint} lacks {_listed(missing)} of the optimizer's state: training cannot continue as if it had "
            "not stopped; set checkpoint.load_optimizer=false to resume with a fresh optimizer and schedule"
        )
    return common


def wrong_common(common: object) -> str:
    """What in common.pt is not of the type that a run writes; empty: nothing."""
    if not isinstance(common, dict):
        return f"it holds {common!r:.40}"
    parts = {key: common.get(key) or {} for key in ("optimizer", "schedule")}
    if wrong := [key for key, part in parts.items() if not isinstance(part, dict)]:
        return f"{wrong[0]} is {parts[wrong[0]]!r:.40}"
    counts = [("step", parts["optimizer"].get("step", 0))]
    counts += [("num_steps", parts["schedule"].get("num_steps"))] if parts["schedule"] else []
    for name, value in counts:
        if type(value) is not int or not 0 <= value < 2**53:
            return f"{name} is {value!r:.40}, which is no count"
    digests = parts["optimizer"].get("digests")
    if digests is not None and not (isinstance(digests, dict) and all(type(key) is str for key in digests)):
        return f"digests is {digests!r:.40}"
    return ""


def _refuse_changed(checkpoint: Path, stored: dict[str, int], loaded: dict[str, int]) -> None:
    """Refuse an optimizer whose state is not what it was when it was saved."""
    changed = sorted(name for name in stored.keys() | loaded.keys() if stored.get(name) != loaded.get(name))
    if changed:
        raise CheckpointError(
            f"the optimizer state loaded from {checkpoint} is not the state that was saved: the digests of "
            f"{_listed(changed)} differ. Set checkpoint.load_optimizer=false to resume with a fresh optimizer and "
            "schedule, and please report this with the layouts of both runs"
        )


def _refuse_shifted(checkpoint: Path, mismatched: list[str]) -> None:
    """Refuse what earlier versions saved with some layouts: master weights and moments shifted inside the buffers.

    Those checkpoints have no digests. A master weight rounds to its weight, unless it belongs to another element.

    Args:
        checkpoint: for the message.
        mismatched: keys of this rank's parameters whose master weights do not.
    """
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mismatched)
    if shifted := sorted({name for part in gathered for name in part}):
        raise CheckpointError(
            f"{checkpoint} was written by an earlier version, which shifted the optimizer state under some layouts: "
            f"the master weights of {_listed(shifted)} do not match the weights, and their moments are wrong too. The "
            "weights are correct: set checkpoint.load_optimizer=false to resume with a fresh optimizer and schedule"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
