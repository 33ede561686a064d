"""What a run needs before its model is built: a mistake is told in seconds, not after a warm start."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_g2rl.config import Config
from megatron_g2rl.config.checks import BUILTIN_MODEL, check_config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.model_shape import read_model_shape
from megatron_g2rl.data.prompts import PromptStream, load_prompts
from megatron_g2rl.data.sources import builtin_task
from megatron_g2rl.data.tiny_model import make_tokenizer
from megatron_g2rl.errors import UserError
from megatron_g2rl.evaluation.periodic import PeriodicEvaluation
from megatron_g2rl.policy import checkpoint as checkpoints
from megatron_g2rl.policy.hf.weights import check_folder
from megatron_g2rl.policy.runtime import Runtime
from megatron_g2rl.rewards.distribute import DistributedRewards
from megatron_g2rl.rollout.tokenizer import load_tokenizer
from megatron_g2rl.tracking.progress import Display
from megatron_g2rl.warm_start import resolve_model


@dataclass(frozen=True)
class Prepared:
    """Everything that was checked and loaded, the same on every rank."""

    checkpoint: Path | None
    """Checkpoint to go on from."""
    model_path: Path
    """Hugging Face folder to start from."""
    prompts: PromptStream
    evaluation: PeriodicEvaluation | None
    rewards: DistributedRewards


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
    checkpoint = _claim(folder, config, runtime.rank)
    builtin = config.model.path == BUILTIN_MODEL
    model_path = None if builtin else _model(config, runtime, display)
    # A built-in model is taught on the spot, which takes a minute; its tokenizer is known before.
    tokenizer = make_tokenizer(builtin_task(config.data.source).words) if builtin else load_tokenizer(str(model_path))
    prompts = _prompts(config, tokenizer)
    evaluation = PeriodicEvaluation(config, tokenizer) if config.evaluation else None
    rewards = DistributedRewards(config.reward)
    rewards.try_on(prompts.dataset[0].answer)
    return Prepared(checkpoint, model_path or _model(config, runtime, display), prompts, evaluation, rewards)


def _claim(folder: Path, config: Config, rank: int) -> Path | None:
    """Make the run's folder and make sure that it can be written; its newest checkpoint, agreed on by all ranks."""
    found: list[Path | UserError | None] = [None]
    if rank == 0:
        try:
            _make_writable(folder)
            found = [_checkpoint(folder, config.checkpoint.resume)]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def _make_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"room for more than nothing")
    except OSError as error:
        raise ConfigError(
            f"run.directory={folder.parent}: the run cannot write to {folder} ({error.strerror}): set run.directory to "
            "a folder that you may write to and that has room"
        ) from error


def _checkpoint(folder: Path, resume: bool) -> Path | None:
    found = checkpoints.newest(folder / "checkpoints")
    if found and not resume:
        raise ConfigError(
            f"{found} exists and checkpoint.resume is false: choose another run.name, remove the folder, "
            "or set checkpoint.resume=true to go on"
        )
    if found:
        checkpoints.check(found)
    return found


def _model(config: Config, runtime: Runtime, display: Display) -> Path:
    path = resolve_model(config, runtime, display)
    # A hub name or the built-in model has a shape only now.
    check_config(config, read_model_shape(str(path)), runtime.world_size)
    check_folder(path)
    return path


def _prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptStream:
    dataset, count = load_prompts(config.data, tokenizer), config.trainer.prompts_per_step
    if count > len(dataset):
        raise ConfigError(
            f"trainer.prompts_per_step={count}, but data.source={config.data.source} has only {len(dataset)} usable "
            "prompts: lower it to that or less"
        )
    return PromptStream(dataset, config.run.seed, config.data.shuffle)
