"""Validate and load a run's inputs before the model is built, so that errors appear within seconds."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_g2rl.config import Config
from megatron_g2rl.config.benchmark import read_benchmarks
from megatron_g2rl.config.changes import Change, check_changes
from megatron_g2rl.config.checks import check_config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.inputs import BUILTIN
from megatron_g2rl.config.model_shape import read_model_shape
from megatron_g2rl.config.regular_files import pipes
from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.data.faults import Faults
from megatron_g2rl.data.prompts import PromptDataset, PromptStream, check_embedding, load_prompts
from megatron_g2rl.data.references import sample_places, verify_references
from megatron_g2rl.distributed.collectives import on_first_rank
from megatron_g2rl.distributed.hub import fetch_model
from megatron_g2rl.errors import UserError
from megatron_g2rl.evaluation.evaluate import OWN_SET_LABEL, Evaluator, benchmark_rewards, load_benchmark, load_own_set
from megatron_g2rl.policy.checkpoint import checkpoints
from megatron_g2rl.policy.checkpoint.save import remove_unfinished
from megatron_g2rl.policy.hf.weights import check_folder
from megatron_g2rl.policy.runtime import Runtime
from megatron_g2rl.records import Prompt
from megatron_g2rl.rewards.distribute import DistributedRewards
from megatron_g2rl.rewards.verifier import MATH_REWARD
from megatron_g2rl.rollout import vllm_compat
from megatron_g2rl.rollout.endings import Endings, read_endings
from megatron_g2rl.rollout.tokenizer import load_tokenizer
from megatron_g2rl.training.contents import check_contents, contents
from megatron_g2rl.training.extensions import check_extensions
from megatron_g2rl.training.run_lock import RunLock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Validated and loaded inputs, identical on every rank except for the lock."""

    lock: RunLock | None
    """Lock of the run folder, on rank 0 only."""
    checkpoint: Path | None
    """Checkpoint to resume from."""
    model_path: Path
    """Hugging Face folder to start from."""
    prompts: PromptStream
    evaluators: tuple[Evaluator, ...]
    """One for each evaluation set of `config.evaluation`; empty without evaluations."""
    rewards: DistributedRewards
    endings: Endings
    """Tokens and strings that end a response."""
    contents: dict[str, str]
    """Digests of the inputs that the configuration names; stored in each checkpoint."""


def prepare(config: Config, runtime: Runtime, folder: Path, opened: ExitStack) -> Prepared:
    """Validate and load the run folder, checkpoint, model, prompts and reward function; a collective.

    Args:
        config: the run's configuration.
        runtime: rank, device and process groups.
        folder: the run folder.
        opened: gets a callback for everything that has to be closed.

    Raises:
        UserError: an input is invalid; every rank raises the same error.
    """
    if config.rollout.engine == "vllm":
        vllm_compat.check_version()
    check_extensions(config)
    lock = _claim(folder)
    checkpoint = _checkpoint(folder, config)
    model_path = _model(config, runtime)
    tokenizer = load_tokenizer(str(model_path))
    rewards = DistributedRewards(config.reward)
    opened.callback(rewards.close)
    columns = rewards.possible_columns
    prompts = _prompts(config, tokenizer, columns)
    needed = rewards.bind(prompts.dataset.column_names)
    has_own_set = config.evaluation is not None and config.evaluation.has_own_set
    own_set = load_own_set(config, tokenizer, columns, needed) if has_own_set else None
    evaluators = _benchmark_evaluators(config, tokenizer, opened)
    if own_set is not None:
        evaluators = (Evaluator(config, own_set, rewards), *evaluators)
    rows = read_model_shape(str(model_path)).vocab_size
    for dataset in (prompts.dataset, *(evaluator.prompts for evaluator in evaluators)):
        check_embedding(dataset, tokenizer, rows)
    on_first_rank(
        lambda: _check_references(config, prompts.dataset, own_set), "the references cannot be verified", UserError
    )
    rewards.smoke_test(prompts.dataset[0], lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    digests = on_first_rank(
        lambda: _contents(config, model_path, prompts.dataset, evaluators, checkpoint),
        "a digest cannot be made",
        checkpoints.CheckpointError,
    )
    endings = read_endings(config, str(model_path), tokenizer)
    if runtime.rank == 0:
        log.info("a response ends at %s", endings.described)
    return Prepared(lock, checkpoint, model_path, prompts, evaluators, rewards, endings, digests)


def _benchmark_evaluators(
    config: Config, tokenizer: PreTrainedTokenizerBase, opened: ExitStack
) -> tuple[Evaluator, ...]:
    """Evaluators on the benchmarks of `config.evaluation`."""
    benchmarks = read_benchmarks(config.evaluation.benchmarks if config.evaluation else ())
    rewards = benchmark_rewards(config.reward, benchmarks, opened)
    return tuple(
        Evaluator(
            config, load_benchmark(config, name, benchmark, tokenizer, rewards[name]), rewards[name], benchmark, name
        )
        for name, benchmark in benchmarks.items()
    )


def _claim(folder: Path) -> RunLock | None:
    """Create the run folder and lock it; returns the lock on rank 0, None elsewhere."""
    taken: list[RunLock] = []

    def claim() -> None:
        with _as_config_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            refuse_foreign(folder)
            taken.append(RunLock(folder))
            for parent in (folder, folder / "checkpoints", folder / "hf"):
                remove_unfinished(parent)  # these leftovers may be what fills the disk
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"room for more than nothing")

    on_first_rank(claim, f"{folder} cannot be used", UserError)
    return taken[0] if taken else None


_FILES = ("metrics.jsonl", "responses.jsonl", "evaluation.jsonl", "config.yaml", "status.json", "run.lock")
"""Files that a run writes directly into its folder."""


def refuse_foreign(folder: Path) -> None:
    """Refuse a run folder in which an entry of the wrong type has the name of a file or folder of the run.

    Raises:
        ConfigError: names the entry.
    """
    wrong = [folder / name for name in _FILES if (folder / name).is_dir()]
    wrong += [path for parent in (folder, folder / "checkpoints", folder / "rollouts") for path in pipes(parent)]
    inside = [folder / name for name in ("checkpoints", "rollouts", "hf", "model", "tensorboard")]
    wrong += [path for path in inside if path.exists() and not path.is_dir()]
    if wrong:
        raise ConfigError(
            f"{wrong[0]} is not the file or folder that a run expects: remove it, or choose another run.name"
        )


@contextmanager
def _as_config_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run.directory={folder.parent}: the run cannot write to {folder} ({error.strerror}): free disk "
            "space there, or set run.directory to a folder that is writable and has free space"
        ) from error


def _checkpoint(folder: Path, config: Config) -> Path | None:
    """The checkpoint to resume from: the latest complete one; None if there is none."""
    saved = folder / "checkpoints"
    agree = partial(on_first_rank, error=checkpoints.CheckpointError)
    while latest := agree(lambda: checkpoints.latest(saved), f"{saved} cannot be read"):
        if not config.checkpoint.resume:
            raise ConfigError(
                f"{latest} exists and checkpoint.resume is false: choose another run.name, remove the folder, "
                "or set checkpoint.resume=true to resume"
            )
        try:
            checkpoints.verify(latest)
        except checkpoints.CorruptCheckpoint as error:
            only = agree(lambda: len(checkpoints.complete(saved)) == 1, f"{saved} cannot be read")
            if config.checkpoint.on_corruption == "error" or only:
                raise
            agree(lambda latest=latest, error=error: _set_aside(latest, error), f"{latest} cannot be renamed")
            continue
        changed = agree(lambda latest=latest: _changed(latest, config), f"{latest} cannot be read")
        if changed and dist.get_rank() == 0:
            log.warning("changed since %s: %s", latest.name, "; ".join(map(str, changed)))
        return latest
    return None


def _set_aside(checkpoint: Path, error: Exception) -> None:
    aside = checkpoint.with_name(f"damaged_{checkpoint.name}_{time.strftime('%Y%m%d_%H%M%S')}")
    checkpoint.rename(aside)
    log.warning("%s\nIt was set aside as %s (checkpoint.on_corruption=previous)", error, aside.name)


def _changed(checkpoint: Path, config: Config) -> list[Change]:
    return check_changes(checkpoints.read_state(checkpoint)["trainer"]["config"], config, checkpoint)


def _contents(config, model, prompts, evaluators, checkpoint: Path | None) -> dict[str, str]:
    """Digests of the inputs, after comparing them with those of the checkpoint."""
    digests = contents(config, model, prompts, {evaluator.name: evaluator.prompts for evaluator in evaluators})
    if checkpoint is not None:
        check_contents(checkpoints.read_state(checkpoint)["trainer"].get("contents", {}), digests, config, checkpoint)
    return digests


def _model(config: Config, runtime: Runtime) -> Path:
    """Folder of the model to train; a hub model is downloaded."""
    location = config.origin_of("model.path")
    path = fetch_model(config.model.path, f"{location + ': ' if location else ''}model.path={config.model.path}")
    # The shape of a hub model is known only now.
    check_config(config, read_model_shape(str(path)), runtime.world_size)
    on_first_rank(lambda: check_folder(path, config.model.family), f"{path} cannot be read")
    return path


def _check_references(config: Config, prompts: PromptDataset, own_set: Sequence[Prompt] | None) -> None:
    """Verify the references of the training and evaluation sets against themselves, for the built-in math reward."""
    if not config.reward.uses(MATH_REWARD):
        return
    if not _is_generated(config.data):
        prompts.references(config.reward).check(config.data)
    if own_set is None or _is_generated(data := config.evaluation.data(config.data)):
        return
    sampled = [own_set[row] for row in sample_places(len(own_set))]
    report = verify_references(
        [prompt.answer for prompt in sampled], lambda i: sampled[i].source, Faults(), len(own_set), config.reward
    )
    try:
        report.check(data)
    except DataError as error:
        raise DataError(f"{OWN_SET_LABEL}: {error}") from error


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
