"""Finds, verifies and loads the checkpoints of a run; `policy.checkpoint.save` writes them.

A checkpoint is a Megatron folder `step_00000020`: `megatron/` (megatron.core.dist_checkpointing: weights, optimizer,
schedule, in a format that any layout can load), `trainer.json` (the state that the training loop needs to resume), the
model's config and tokenizer files, and `manifest.json`, which is written last. The folder gets its final name when it
is complete: a reader never sees a partial checkpoint.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_g2rl.config.run_files import MANIFEST, MEGATRON, TRAINER_STATE
from megatron_g2rl.distributed.collectives import gather, on_all_ranks, on_first_rank
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
from megatron_g2rl.policy.critic import Critic
from megatron_g2rl.policy.hf.megatron_folder import CRITIC, MegatronTensors
from megatron_g2rl.policy.model import unwrap
from megatron_g2rl.policy.optimizer import Optimizer
from megatron_g2rl.policy.policy import Policy

_FOLDER = re.compile(r"step_(\d{8})$")


class CheckpointError(UserError):
    """A checkpoint cannot be read or written."""


class CorruptCheckpoint(CheckpointError):
    """A checkpoint's files differ from what was written."""


def step_folder(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(_FOLDER.match(checkpoint.name)[1])


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step_*") if _FOLDER.match(p.name) and (p / MANIFEST).is_file())


def latest(folder: Path) -> Path | None:
    """The latest complete checkpoint in `folder`, or None."""
    return next(reversed(complete(folder)), None)


def resume_hint(folder: Path) -> str:
    """What rerunning the command of an interrupted run does, as a sentence without a final period.

    Args:
        folder: the run's checkpoint folder.
    """
    if checkpoint := latest(folder):
        return f"The same command resumes from step {step_of(checkpoint)}, the latest checkpoint ({checkpoint})"
    return "There is no checkpoint yet: the same command starts the run from the beginning"


def read_state(checkpoint: Path) -> dict:
    """The trainer state saved next to Megatron's shards, as passed to `Checkpoints.save`."""
    return json.loads((checkpoint / TRAINER_STATE).read_text())


def architecture_signature(checkpoint: Path) -> dict:
    """The signature of a checkpoint's model (`Architecture.signature`).

    Raises:
        CheckpointError: the trainer state does not contain it.
    """
    state = read_state(checkpoint)
    signature = state.get("architecture") if isinstance(state, dict) else None
    if not isinstance(signature, dict):
        remedy = "it was edited or is corrupt; remove it to resume from the previous one"
        raise CheckpointError(f"{checkpoint}: {TRAINER_STATE} has {signature!r:.40} for architecture: {remedy}")
    return signature


def check(checkpoint: Path) -> None:
    """Refuse a checkpoint with a missing or truncated file, or with an unsafe pickle, without reading the tensors.

    Raises:
        CorruptCheckpoint: names the file and the previous checkpoint.
        UnsafePickle: a pickle in it could run code.
    """
    try:
        read_state(checkpoint)
        needed: dict[str, int] = {}
        for shard in read_metadata(checkpoint / MEGATRON).storage_data.values():
            needed[shard.relative_path] = max(needed.get(shard.relative_path, 0), shard.offset + shard.length)
        for name, size in needed.items():
            if (actual := (checkpoint / MEGATRON / name).stat().st_size) < size:
                raise EOFError(f"{name} is truncated: {actual} of {size} bytes")
        check_pickles(checkpoint / MEGATRON)
    except CorruptPickle as error:
        raise _corrupt(checkpoint, [str(error)]) from error
    except (OSError, ValueError, EOFError) as error:
        raise _corrupt(checkpoint, [f"{type(error).__name__}: {error}"]) from error


def _corrupt(checkpoint: Path, messages: list[str]) -> CorruptCheckpoint:
    before = [p for p in complete(checkpoint.parent) if p.name < checkpoint.name]
    if before:
        remedy = (
            f"{before[-1]} is the previous complete checkpoint: set checkpoint.on_corruption=previous to resume from it"
        )
    else:
        remedy = (
            "there is no complete checkpoint before it: remove this folder, and the same command starts from the "
            "beginning"
        )
    return CorruptCheckpoint(f"{manifest.corruption_message(checkpoint, messages)}. {remedy[0].upper()}{remedy[1:]}")


def verify(checkpoint: Path) -> None:
    """Verify the checksum of every file, split over the ranks by size, and check every pickle; a collective.

    Raises:
        CorruptCheckpoint: names the files, what is wrong with them, and the previous checkpoint; on every rank.
        UnsafePickle: the files are intact, but a pickle could run code; on every rank.
    """
    found = on_all_ranks(
        lambda: manifest.find_corruption(checkpoint, dist.get_rank(), dist.get_world_size()),
        f"{checkpoint} cannot be read",
        CheckpointError,
    )
    messages = sorted({message for part in found for message in part})
    if messages:
        raise on_first_rank(lambda: _corrupt(checkpoint, messages), f"{checkpoint} is corrupt", CheckpointError)
    on_first_rank(lambda: check(checkpoint), f"{checkpoint} cannot be read", CheckpointError)


@torch.no_grad()
def load(checkpoint: Path, policy: Policy, *, critic: Critic | None = None, load_optimizer: bool = True) -> dict:
    """Restore weights, optimizer and schedule from a checkpoint saved under any layout; a collective.

    Args:
        checkpoint: a training checkpoint.
        policy: the policy to restore.
        critic: the critic to restore; None: one in the checkpoint is ignored.
        load_optimizer: False: load only the weights; optimizer and schedule are reset, and the master weights are set
            from the weights.

    Returns:
        The trainer state that was saved with it.

    Raises:
        CheckpointError: the checkpoint belongs to another model (Megatron would silently load the tensors that match)
            or lacks required content (named; raised on every rank, before any weight is changed), or the loaded
            optimizer state differs from what was saved (on every rank, after weights were changed).
        UnsafePickle: a pickle in it could run code.
    """
    optimizers = {"": policy.optimizer} | ({} if critic is None else {CRITIC: critic.optimizer})

    def check_all() -> None:
        check(checkpoint)
        _refuse_other_model(checkpoint, policy)

    on_first_rank(check_all, f"{checkpoint} cannot be read", CheckpointError)
    parts = []
    for prefix, optimizer in optimizers.items():
        optimizer.wake()
        models = [unwrap(chunk) for chunk in optimizer.chunks]
        reader = MegatronTensors(checkpoint, prefix)
        common = _require(checkpoint, expected_tensors(models), reader, load_optimizer, prefix)
        parts.append((optimizer, models, reader, common))
    for optimizer, models, reader, common in parts:
        read_weights(models, reader, masters=load_optimizer)
        if load_optimizer:
            _load_optimizer(checkpoint, optimizer, reader, common)
        else:
            optimizer.follow_weights()
    return read_state(checkpoint)["trainer"]


def _refuse_other_model(checkpoint: Path, policy: Policy) -> None:
    saved, current = architecture_signature(checkpoint), policy.architecture.signature()
    changed = [
        f"{key} is {saved.get(key)} in the checkpoint, {current[key]} in the model"
        for key in current
        if saved.get(key) != current[key]
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint} belongs to another model than model.path={policy.model_path} ({'; '.join(changed)}): "
            "choose another run.name, or the model that the run started with"
        )


def _load_optimizer(checkpoint: Path, optimizer: Optimizer, reader: MegatronTensors, common: dict) -> None:
    """Restore optimizer and schedule, and compare their state with the digests of what was saved."""
    shards, stored = state_shards(optimizer), common["optimizer"].get("digests")
    if stored is None:
        _refuse_shifted(checkpoint, mismatched_masters(shards, reader))
    read_shards(shards, reader)
    if stored is not None:
        loaded = digests(shards)
        when = f"{checkpoint} cannot be verified"
        on_first_rank(lambda: _refuse_changed(checkpoint, stored, loaded), when, CheckpointError)
    # Every applied update advances both; earlier versions did not store the optimizer's step count.
    step = common["optimizer"].get("step", common["schedule"]["num_steps"])
    optimizer.restore(step, common["schedule"])


def _require(
    checkpoint: Path, expected: dict[str, Expected], reader: MegatronTensors, load_optimizer: bool, prefix: str
) -> dict:
    """Check that a checkpoint has all tensors of `expected`; return the model's state that is the same on every rank.

    Args:
        checkpoint: the checkpoint.
        expected: weights of the model by key.
        reader: reader of the model.
        load_optimizer: as in `load`.
        prefix: of the keys of the model.
    """
    metadata = reader.metadata
    if prefix and not metadata.state_dict_metadata:
        raise CheckpointError(
            f"{checkpoint} has no critic: it was saved with another algorithm.baseline; restore that, or choose "
            "another run.name"
        )
    if missing := missing_tensors(expected, metadata):
        raise CheckpointError(
            f"{checkpoint} lacks {_listed(missing)}, or has them in a different shape: it belongs to another model; "
            "choose another run.name, or the model that the run started with"
        )
    if not load_optimizer:
        return {}
    path = checkpoint / MEGATRON / "common.pt"
    common = on_first_rank(lambda: load_saved(path), f"{path} cannot be read", CheckpointError)
    if prefix and isinstance(common, dict):
        common = common.get(prefix.rstrip("."))
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
    """What in common.pt has another type than a run writes; empty if nothing."""
    if not isinstance(common, dict):
        return f"it contains {common!r:.40}"
    parts = {key: common.get(key) or {} for key in ("optimizer", "schedule")}
    if wrong := [key for key, part in parts.items() if not isinstance(part, dict)]:
        return f"{wrong[0]} is {parts[wrong[0]]!r:.40}"
    counts = [("step", parts["optimizer"].get("step", 0))]
    counts += [("num_steps", parts["schedule"].get("num_steps"))] if parts["schedule"] else []
    for name, value in counts:
        if type(value) is not int or not 0 <= value < 2**53:
            return f"{name} is {value!r:.40}, which is not a count"
    digests = parts["optimizer"].get("digests")
    if digests is not None and not (isinstance(digests, dict) and all(type(key) is str for key in digests)):
        return f"digests is {digests!r:.40}"
    return ""


def _refuse_changed(checkpoint: Path, stored: dict[str, int], loaded: dict[str, int]) -> None:
    """Refuse an optimizer whose loaded state differs from the saved state."""
    changed = sorted(name for name in stored.keys() | loaded.keys() if stored.get(name) != loaded.get(name))
    if changed:
        raise CheckpointError(
            f"the optimizer state loaded from {checkpoint} is not the state that was saved: the digests of "
            f"{_listed(changed)} differ. Set checkpoint.load_optimizer=false to resume with a fresh optimizer and "
            "schedule, and please report this with the layouts of both runs"
        )


def _refuse_shifted(checkpoint: Path, mismatched: list[str]) -> None:
    """Refuse checkpoints of earlier versions whose master weights and moments were shifted inside the buffers.

    This happened under some layouts. Those checkpoints have no digests. A master weight rounds to its weight, unless it
    belongs to another element.

    Args:
        checkpoint: for the message.
        mismatched: keys of this rank's parameters whose master weights do not round to their weights.
    """
    if shifted := sorted({name for part in gather(mismatched) for name in part}):
        raise CheckpointError(
            f"{checkpoint} was written by an earlier version, which shifted the optimizer state under some layouts: "
            f"the master weights of {_listed(shifted)} do not match the weights, and their moments are wrong too. The "
            "weights are correct: set checkpoint.load_optimizer=false to resume with a fresh optimizer and schedule"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
