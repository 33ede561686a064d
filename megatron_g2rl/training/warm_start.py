"""Create the built-in model, warm-start it with a short SFT run, and cache it.

The SFT run uses the same Megatron policy as training. The cache entry (in XDG_CACHE_HOME or ~/.cache) is named by a
hash of its inputs, so that a changed setting creates a new model.
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
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import AutoTokenizer

from megatron_g2rl import __version__
from megatron_g2rl.algorithm import UpdateTotals, supervised_loss
from megatron_g2rl.config import Config
from megatron_g2rl.config.inputs import BUILTIN_MODEL
from megatron_g2rl.config.sections.model import OptimizerConfig
from megatron_g2rl.data.sources import builtin_task
from megatron_g2rl.data.tasks import Task
from megatron_g2rl.data.tiny_model import TinyModel, demonstrations, make_tiny_model
from megatron_g2rl.distributed.collectives import on_first_rank
from megatron_g2rl.distributed.hub import fetch_once
from megatron_g2rl.errors import UserError
from megatron_g2rl.policy.packing import TokenSequence, row_mask
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.policy.runtime import Runtime
from megatron_g2rl.tracking.progress import WARM_START, Display


def resolve_model(config: Config, runtime: Runtime, display: Display) -> Path:
    """Folder of the model to train; creates the built-in model if requested and not cached. A collective.

    A hub model is downloaded once for all ranks that share a cache (`hub.fetch_once`).

    Raises:
        UserError: it is not a folder and the download failed, or the cache of built-in models cannot be written.
    """
    if config.model.path == BUILTIN_MODEL:
        return _builtin_model(config, runtime, display)
    location = config.origin_of("model.path")
    return fetch_model(config.model.path, f"{location + ': ' if location else ''}model.path={config.model.path}")


def fetch_model(name: str, label: str) -> Path:
    """Folder of a model: `name` itself, or the download of a Hub model of that name; a collective.

    Args:
        name: folder or Hub name.
        label: the model in messages.

    Raises:
        UserError: it is not a folder and the download failed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import constants, snapshot_download

    def fetch() -> str | None:
        try:
            snapshot_download(name)
        except (OSError, ValueError, HfHubHTTPError) as error:
            return _not_fetched(error)

    problems = fetch_once(Path(constants.HF_HUB_CACHE), fetch)
    if problem := next(filter(None, problems), None):
        raise UserError(f"{label} is not a folder (relative paths start at {Path.cwd()}), and {problem}")
    return Path(snapshot_download(name, local_files_only=True))


def _not_fetched(error: Exception) -> str:
    """Why the download of a model failed, and how to fix it."""
    if isinstance(error, RepositoryNotFoundError):  # also raised for gated models
        return (
            "the Hugging Face Hub has no model of that name that you can access. Correct the name, or log in with "
            "`hf auth login`"
        )
    if isinstance(error, LocalEntryNotFoundError):  # not in the cache either
        cause = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
        return (
            f"the Hugging Face Hub cannot be reached ({cause}). Pass a local folder, fix the network, or download the "
            "model on a connected machine: hf download NAME --local-dir FOLDER"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"the download from the Hugging Face Hub failed ({reason}). Pass a local folder or fix the error above"


def _builtin_model(config: Config, runtime: Runtime, display: Display) -> Path:
    task, size = builtin_task(config.data.source), TinyModel()
    folder = _cache_folder(config, task, size)
    if on_first_rank((folder / "config.json").is_file):
        return folder
    # Written to a temporary folder next to the cache entry and renamed when complete: no run sees a partial model.
    scratch = on_first_rank(lambda: _make_untrained(folder, task, config.run.seed, size))
    made = scratch / "untrained"
    if config.warm_start is not None:
        policy, made = _fine_tune(config, runtime, made, task, display), scratch / "fine_tuned"
        policy.save_hf(made)
    on_first_rank(lambda: _publish(made, folder))
    return folder


def _make_untrained(folder: Path, task: Task, seed: int, size: TinyModel) -> Path:
    """Create the random model in a new temporary folder, as its subfolder `untrained`; returns the temporary folder."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    except OSError as error:
        raise UserError(
            f"the cache of built-in models, {folder.parent}, is not writable ({error.strerror}): set "
            "XDG_CACHE_HOME to a writable folder"
        ) from error
    make_tiny_model(scratch / "untrained", task=task, seed=seed, size=size)
    return scratch


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
    """Move a complete model into the cache, unless another run already put the same model there; drop the rest."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
    shutil.rmtree(made.parent)


def _fine_tune(config: Config, runtime: Runtime, path: Path, task: Task, display: Display) -> Policy:
    """Run the SFT steps; every step uses new demonstrations."""
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
        totals = UpdateTotals(tokens=sum(len(s.response) for s in batch), responses=len(batch))

        def loss(logprobs: torch.Tensor, entropy, packed, totals=totals):
            return supervised_loss(logprobs, row_mask(packed), totals=totals)

        result, metrics, _ = policy.update(batch, loss)
        if not result.applied:
            raise UserError(
                f"warm start, step {step + 1}: loss {metrics['loss']} or gradient norm {result.gradient_norm} is not "
                "finite; lower warm_start.learning_rate"
            )
        display.show(step + 1, {"warm_start/loss": metrics["loss"]})
    return policy
