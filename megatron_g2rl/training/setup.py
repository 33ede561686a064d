"""Validate and load a run's inputs before the model is built, so that errors appear within seconds."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_g2rl.config import Config
from megatron_g2rl.config.changes import Change, check_changes
from megatron_g2rl.config.checks import check_config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.inputs import BUILTIN, BUILTIN_MODEL
from megatron_g2rl.config.model_shape import read_model_shape
from megatron_g2rl.config.regular_files import pipes
from megatron_g2rl.config.tree import DataConfig
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.data.faults import Faults
from megatron_g2rl.data.prompts import PromptDataset, PromptStream, check_embedding, load_prompts
from megatron_g2rl.data.references import sample_places, verify_references
from megatron_g2rl.data.sources import builtin_task
from megatron_g2rl.data.tiny_model import make_tokenizer
from megatron_g2rl.evaluation.evaluate import HELD_OUT
from megatron_g2rl.evaluation.periodic import PeriodicEvaluation
from megatron_g2rl.policy.checkpoint import checkpoints
from megatron_g2rl.policy.checkpoint.save import remove_unfinished
from megatron_g2rl.policy.hf.weights import check_folder
from megatron_g2rl.policy.runtime import Runtime
from megatron_g2rl.rewards.distribute import DistributedRewards
from megatron_g2rl.rewards.verifier import MATH_REWARD
from megatron_g2rl.rollout import vllm_compat
from megatron_g2rl.rollout.endings import Endings, read_endings
from megatron_g2rl.rollout.tokenizer import load_tokenizer
from megatron_g2rl.tracking.progress import Display
from megatron_g2rl.training.contents import check_contents, contents
from megatron_g2rl.training.run_lock import RunLock
from megatron_g2rl.training.warm_start import resolve_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything that was checked and loaded, the same on every rank."""

    lock: RunLock | None
    """The right to write to the run's folder, on rank 0."""
    checkpoint: Path | None
    """Checkpoint to go on from."""
    model_path: Path
    """Hugging Face folder to start from."""
    prompts: PromptStream
    evaluation: PeriodicEvaluation | None
    rewards: DistributedRewards
    endings: Endings
    """What ends a response."""
    contents: dict[str, str]
    """Digests of what the configuration names; a checkpoint holds them."""


def prepare(config: Config, runtime: Runtime, folder: Path, display: Display) -> Prepared:
    """Check the run's folder, its checkpoint, model, problems and reward function, and load them; a collective.

    Args:
        config: of the run.
        runtime: where this rank stands.
        folder: where the run writes.
        display: shows the warm start of a built-in model, which comes last.

    Raises:
        UserError: something cannot be used; every rank raises the same.
    """
    if config.rollout.engine == "vllm":
        vllm_compat.check_version()
    lock = _claim(folder)
    checkpoint = _checkpoint(folder, config)
    builtin = config.model.path == BUILTIN_MODEL
    model_path = None if builtin else _model(config, runtime, display)
    # A built-in model is taught on the spot, which takes a minute; its tokenizer is known before.
    tokenizer = make_tokenizer(builtin_task(config.data.source).words) if builtin else load_tokenizer(str(model_path))
    rewards = DistributedRewards(config.reward)
    columns = rewards.possible_columns
    prompts = _prompts(config, tokenizer, columns)
    needed = rewards.bind(prompts.dataset.column_names)
    evaluation = PeriodicEvaluation(config, tokenizer, columns, needed) if config.evaluation else None
    if model_path is not None:
        rows = read_model_shape(str(model_path)).vocab_size
        for asked in filter(None, (prompts.dataset, evaluation and evaluation.evaluator.prompts)):
            check_embedding(asked, tokenizer, rows)
    checkpoints.on_first_rank(
        lambda: _check_references(config, prompts.dataset, evaluation), "the references cannot be verified"
    )
    rewards.smoke_test(prompts.dataset[0], lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    held_out = evaluation.evaluator.prompts if evaluation else None
    named = checkpoints.on_first_rank(
        lambda: _contents(config, model_path, prompts.dataset, held_out, checkpoint), "a digest cannot be made"
    )
    model_path = model_path or _model(config, runtime, display)
    endings = read_endings(config, str(model_path), tokenizer)
    if runtime.rank == 0:
        log.info("a response ends at %s", endings.described)
    return Prepared(lock, checkpoint, model_path, prompts, evaluation, rewards, endings, named)


def _claim(folder: Path) -> RunLock | None:
    """Make the run's folder and take it; the lock on rank 0."""
    taken: list[RunLock] = []

    def claim() -> None:
        with _told_where(folder):
            folder.mkdir(parents=True, exist_ok=True)
            refuse_foreign(folder)
            taken.append(RunLock(folder))
            for place in (folder, folder / "checkpoints", folder / "hf"):
                remove_unfinished(place)  # it may be what fills the disk
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"room for more than nothing")

    checkpoints.on_first_rank(claim, f"{folder} cannot be used")
    return taken[0] if taken else None


_FILES = ("metrics.jsonl", "responses.jsonl", "evaluation.jsonl", "config.yaml", "status.json", "run.lock")
"""What a run writes into its folder, besides folders."""


def refuse_foreign(folder: Path) -> None:
    """Refuse a run's folder in which something else has the name of a file that the run reads and writes.

    Raises:
        ConfigError: names it.
    """
    wrong = [folder / name for name in _FILES if (folder / name).is_dir()]
    wrong += [path for place in (folder, folder / "checkpoints", folder / "rollouts") for path in pipes(place)]
    inside = [folder / name for name in ("checkpoints", "rollouts", "hf", "model", "tensorboard")]
    wrong += [place for place in inside if place.exists() and not place.is_dir()]
    if wrong:
        raise ConfigError(f"{wrong[0]} is no file or folder of a run: remove it, or choose another run.name")


@contextmanager
def _told_where(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run.directory={folder.parent}: the run cannot write to {folder} ({error.strerror}): make room there, or "
            "set run.directory to a folder that you may write to and that has room"
        ) from error


def _checkpoint(folder: Path, config: Config) -> Path | None:
    """The checkpoint to go on from: the newest one, whole, and of this run."""
    saved, agree = folder / "checkpoints", checkpoints.on_first_rank
    while found := agree(lambda: checkpoints.newest(saved), f"{saved} cannot be read"):
        if not config.checkpoint.resume:
            raise ConfigError(
                f"{found} exists and checkpoint.resume is false: choose another run.name, remove the folder, "
                "or set checkpoint.resume=true to go on"
            )
        try:
            checkpoints.verify(found)
        except checkpoints.CheckpointDamaged as error:
            only = agree(lambda: len(checkpoints.complete(saved)) == 1, f"{saved} cannot be read")
            if config.checkpoint.on_corruption == "error" or only:
                raise
            agree(lambda found=found, error=error: _set_aside(found, error), f"{found} cannot be renamed")
            continue
        changed = agree(lambda found=found: _changed(found, config), f"{found} cannot be read")
        if changed and dist.get_rank() == 0:
            log.warning("changed since %s: %s", found.name, "; ".join(map(str, changed)))
        return found
    return None


def _set_aside(checkpoint: Path, error: Exception) -> None:
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}_{time.strftime('%Y%m%d_%H%M%S')}")
    checkpoint.rename(aside)
    log.warning("%s\nIt was set aside as %s (checkpoint.on_corruption=previous)", error, aside.name)


def _changed(checkpoint: Path, config: Config) -> list[Change]:
    return check_changes(checkpoints.read_state(checkpoint)["trainer"]["config"], config, checkpoint)


def _contents(config, model, prompts, held_out, checkpoint: Path | None) -> dict[str, str]:
    """Digests of what is named, which are those of the checkpoint."""
    found = contents(config, model, prompts, held_out)
    if checkpoint is not None:
        check_contents(checkpoints.read_state(checkpoint)["trainer"].get("contents", {}), found, config, checkpoint)
    return found


def _model(config: Config, runtime: Runtime, display: Display) -> Path:
    path = resolve_model(config, runtime, display)
    # A hub name or the built-in model has a shape only now.
    check_config(config, read_model_shape(str(path)), runtime.world_size)
    check_folder(path)
    return path


def _check_references(config: Config, prompts: PromptDataset, evaluation: PeriodicEvaluation | None) -> None:
    """Verify the references of both sets against themselves, where the built-in reward function will."""
    if not config.reward.uses(MATH_REWARD):
        return
    if not _is_generated(config.data):
        prompts.references(config.reward).check(config.data)
    if evaluation is None or _is_generated(data := config.evaluation.data(config.data)):
        return
    held_out = evaluation.evaluator.prompts
    asked = [held_out[place] for place in sample_places(len(held_out))]
    found = verify_references(
        [prompt.answer for prompt in asked], lambda i: asked[i].source, Faults(), len(held_out), config.reward
    )
    try:
        found.check(data)
    except DataError as error:
        raise DataError(f"{HELD_OUT}: {error}") from error


def _is_generated(data: DataConfig) -> bool:
    return all(source.source.startswith(BUILTIN) for source in data.each_source())


def _prompts(config: Config, tokenizer: PreTrainedTokenizerBase, columns: Collection[str]) -> PromptStream:
    dataset, count = load_prompts(config.data, tokenizer, columns), config.trainer.prompts_per_step
    if count > len(dataset):
        raise ConfigError(
            f"trainer.prompts_per_step={count}, but data.source={config.data.label} has only {len(dataset)} usable "
            "prompts: lower it to that or less"
        )
    return PromptStream(dataset, config.run.seed, config.data.shuffle, dataset.parts)
