"""The built-in model, ready to train: written by us, taught the built-in task by a short supervised run, and cached.

The supervised run uses the same Megatron policy as everything else. The cache (in XDG_CACHE_HOME or ~/.cache) is named
by what went in, so a changed setting makes a new model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoTokenizer

from megatron_g2rl import __version__
from megatron_g2rl.algorithm import Totals, supervised_loss
from megatron_g2rl.config import Config
from megatron_g2rl.config.inputs import BUILTIN_MODEL
from megatron_g2rl.config.tree import OptimizerConfig
from megatron_g2rl.data.sources import builtin_task
from megatron_g2rl.data.tasks import Task
from megatron_g2rl.data.tiny_model import TinyModel, demonstrations, make_tiny_model
from megatron_g2rl.distributed.hub import fetch_once
from megatron_g2rl.errors import UserError
from megatron_g2rl.experience import boolean_row_mask
from megatron_g2rl.policy.packing import TokenSequence
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.policy.runtime import Runtime
from megatron_g2rl.tracking.progress import WARM_START, Display


def resolve_model(config: Config, runtime: Runtime, display: Display) -> Path:
    """Folder of the model to train; makes the built-in one when it is asked for and not cached. A collective.

    A hub name is downloaded once for all ranks that share a cache (`hub.fetch_once`).

    Raises:
        UserError: it is no folder and did not come from the hub, or the cache of built-in models cannot be written.
    """
    if config.model.path == BUILTIN_MODEL:
        return _builtin_model(config, runtime, display)
    folder = Path(config.model.path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import constants, snapshot_download

    def fetch() -> str | None:
        try:
            snapshot_download(config.model.path)
        except (OSError, ValueError, HfHubHTTPError) as error:
            return _not_fetched(error)

    problems = fetch_once(Path(constants.HF_HUB_CACHE), fetch)
    if problem := next(filter(None, problems), None):
        place = config.origin_of("model.path")
        raise UserError(
            f"{place + ': ' if place else ''}model.path={config.model.path} is no folder here (relative paths start at "
            f"{Path.cwd()}), and {problem}"
        )
    return Path(snapshot_download(config.model.path, local_files_only=True))


def _not_fetched(error: Exception) -> str:
    """Why a model did not come from the hub, and what to do."""
    if isinstance(error, RepositoryNotFoundError):  # a gated one too
        return (
            "the Hugging Face hub has no model of that name that you may read. Correct the name, or log in with "
            "`hf auth login`"
        )
    if isinstance(error, LocalEntryNotFoundError):  # it is not in the cache either
        cause = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
        return (
            f"the Hugging Face hub cannot be reached ({cause}). Name a folder, or mend the network, or fetch the "
            "model where there is one: hf download NAME --local-dir FOLDER"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"it did not come from the Hugging Face hub ({reason}). Name a folder, or mend that"


def _builtin_model(config: Config, runtime: Runtime, display: Display) -> Path:
    task, size = builtin_task(config.data.source), TinyModel()
    folder = _cache_folder(config, task, size)
    found = [(folder / "config.json").is_file()]
    dist.broadcast_object_list(found, src=0)
    if found[0]:
        return folder
    # Made beside its final place, under a name of its own, and renamed when finished: no run sees half a model.
    scratch = [None]
    if runtime.rank == 0:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch = [Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))]
        except OSError as error:
            raise UserError(
                f"the cache of built-in models, {folder.parent}, cannot be written ({error.strerror}): set "
                "XDG_CACHE_HOME to a folder that can"
            ) from error
        make_tiny_model(scratch[0] / "untrained", task=task, seed=config.run.seed, size=size)
    dist.broadcast_object_list(scratch, src=0)
    made = scratch[0] / "untrained"
    if config.warm_start is not None:
        policy, made = _teach(config, runtime, made, task, display), scratch[0] / "taught"
        policy.save_hf(made)
    if runtime.rank == 0:
        _publish(made, folder)
        shutil.rmtree(scratch[0])
    dist.barrier()
    return folder


def _cache_folder(config: Config, task: Task, size: TinyModel) -> Path:
    content = {
        "version": __version__,
        "seed": config.run.seed,
        "task": repr(task),
        "size": dataclasses.asdict(size),
        "precision": config.policy.precision,
        "warm_start": config.warm_start and config.warm_start.model_dump(),
    }
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "megatron_g2rl" / f"{task.name}-{name}"


def _publish(made: Path, folder: Path) -> None:
    """Rename a finished model to its place in the cache, unless another run with the same content was faster."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise


def _teach(config: Config, runtime: Runtime, path: Path, task: Task, display: Display) -> Policy:
    """Supervised steps on demonstrations; each step has its own."""
    settings = config.warm_start
    policy = Policy(
        path,
        config.policy,
        OptimizerConfig(learning_rate=settings.learning_rate, schedule="cosine", warmup_updates=settings.steps // 20),
        runtime,
        temperature=1.0,
        tokens_per_microbatch=config.trainer.tokens_per_microbatch,
        total_updates=settings.steps,
    )
    count = settings.demonstrations_per_step
    examples = demonstrations(
        task, AutoTokenizer.from_pretrained(path, trust_remote_code=False), settings.steps * count, config.run.seed
    )
    sequences = [TokenSequence(prompt.token_ids, tuple(response)) for prompt, response in examples]
    display.begin(WARM_START, 0, settings.steps)
    for step in range(settings.steps):
        batch = sequences[step * count : (step + 1) * count]
        totals = Totals(tokens=sum(len(s.response) for s in batch), responses=len(batch))

        def loss(logprobs: torch.Tensor, entropy, packed, totals=totals):
            return supervised_loss(logprobs, boolean_row_mask(packed), totals=totals)

        result, metrics = policy.update(batch, loss)
        if not result.applied:
            raise UserError(
                f"warm start, step {step + 1}: loss {metrics['loss']} or gradient norm {result.gradient_norm} is not "
                "finite; lower warm_start.learning_rate"
            )
        display.show(step + 1, {"warm_start/loss": metrics["loss"]})
    return policy
