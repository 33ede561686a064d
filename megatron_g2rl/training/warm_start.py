"""Creates the model of `g2rl warm-start`: random weights or an existing model, after a short SFT run.

The SFT run uses the same Megatron policy as training. The folder appears when it is complete, with a record of the
settings that determine its weights: the command does nothing if they are the same, and refuses any other folder.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from megatron_g2rl.algorithm import UpdateTotals, supervised_loss
from megatron_g2rl.config.checks import model_layout_problems
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.model_shape import read_model_shape
from megatron_g2rl.config.run_files import WARM_START_RECORD
from megatron_g2rl.config.sections.model import OptimizerConfig
from megatron_g2rl.config.warm_start import WarmStart
from megatron_g2rl.data.tiny_model import make_tiny_model, mixed_demonstrations
from megatron_g2rl.distributed.collectives import on_first_rank
from megatron_g2rl.distributed.heartbeat import Heartbeat
from megatron_g2rl.distributed.hub import fetch_model
from megatron_g2rl.errors import UserError, as_disk_error, as_lost_rank_error
from megatron_g2rl.policy import runtime as policy_runtime
from megatron_g2rl.policy.hf.weights import check_folder
from megatron_g2rl.policy.packing import TokenSequence, row_mask
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.registry import TASKS
from megatron_g2rl.rollout.tokenizer import load_tokenizer
from megatron_g2rl.tracking.progress import WARM_START, Display, make_display
from megatron_g2rl.training.contents import folder_digest
from megatron_g2rl.training.run_lock import RunIsBusy, RunLock
from megatron_g2rl.training.stopping import end_on_signals

log = logging.getLogger(__name__)


def warm_start(settings: WarmStart) -> None:
    """Write the model that `settings` describe, unless its folder already holds it; a collective of all ranks.

    Raises:
        UserError: an input is invalid, the folder holds something else, or another process is writing it.
    """
    identity = f"{settings.output.absolute()}\n{settings}"
    end_on_signals()
    runtime = policy_runtime.start(settings.policy, settings.seed, identity)
    try:
        with make_display(settings.output.name, runtime.rank) as display, Heartbeat():
            _create(settings, runtime, display)
    except OSError as error:
        raise as_disk_error(error, settings.output) from error
    except RuntimeError as error:
        raise as_lost_rank_error(error) from error
    finally:
        policy_runtime.stop()


def _create(settings: WarmStart, runtime: policy_runtime.Runtime, display: Display) -> None:
    output = settings.output.expanduser()
    output = output if output.name not in ("", "..") else output.resolve()
    source = None
    if settings.model is not None:
        source = fetch_model(settings.model.path, f"model.path={settings.model.path}")
    record = on_first_rank(lambda: _record(settings, source), "the model cannot be read", UserError)
    if on_first_rank(lambda: _is_created(output, record, settings.family)):
        if runtime.rank == 0:
            log.info("%s already holds this model", settings.output)
        return
    start = time.perf_counter()
    with _scratch_folder(output) as scratch:
        if source is None:
            task = TASKS[settings.task]
            # safetensors raises its own type of error for a full disk
            make = lambda: make_tiny_model(scratch / "untrained", task=task, seed=settings.seed)  # noqa: E731
            source = on_first_rank(make, f"output={output}: the model cannot be written", UserError)
        _fine_tune(settings, runtime, source, display).save_hf(scratch / "fine_tuned")

        def publish() -> None:
            (scratch / "fine_tuned" / WARM_START_RECORD).write_text(json.dumps(record, indent=2) + "\n")
            try:
                (scratch / "fine_tuned").rename(output)
            except OSError:  # not empty: another process may have created the same model since the check
                if not _is_created(output, record, settings.family):
                    raise
            log.info("wrote %s in %.0f s", settings.output, time.perf_counter() - start)

        on_first_rank(publish)


def _record(settings: WarmStart, source: Path | None) -> dict[str, Any]:
    """The settings that determine the weights, apart from rounding, which depends on the layout too."""
    described = settings.model_dump(exclude={"output", "tokens_per_microbatch", "ranks", "policy"})
    precision = {"policy.precision": settings.policy.precision}
    return described | {"model": None if source is None else folder_digest(source)} | precision


def _is_created(output: Path, record: dict[str, Any], family: str | None) -> bool:
    """Whether `output` holds the model of `record`; False if it does not exist or is empty.

    Raises:
        UserError: it holds something else, or a part of the model.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    file, remedy = output / WARM_START_RECORD, "choose another output, or remove it"
    if not file.is_file():
        raise ConfigError(f"output={output} exists and was not written by g2rl warm-start: {remedy}")
    try:
        before = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"output={output}: {file.name} is corrupt ({error}): {remedy}") from error
    changed = [f"{key}: {before.get(key)} -> {value}" for key, value in record.items() if before.get(key) != value]
    if changed:
        raise ConfigError.listing(f"output={output} holds the result of other settings: {remedy}", changed)
    check_folder(output, family)
    return True


@contextmanager
def _scratch_folder(output: Path) -> Iterator[Path]:
    """A locked, empty folder next to `output`, removed at the end; a collective.

    Raises:
        UserError: it cannot be written, or another process has locked it.
    """
    scratch, locks = output.with_name(f".partial_{output.name}"), []

    def claim() -> None:
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            locks.append(RunLock(scratch))
            for left in scratch.glob("*/"):  # by a killed process
                shutil.rmtree(left)
        except RunIsBusy as error:
            raise UserError(f"output={output}: another process is creating this model; wait for it") from error
        except OSError as error:
            file = error.filename or scratch  # a full disk has no file name
            raise UserError(
                f"output={output}: {file} cannot be written ({error.strerror}); choose another output"
            ) from error

    on_first_rank(claim)
    try:
        yield scratch
    finally:
        if locks:  # on rank 0
            shutil.rmtree(scratch, ignore_errors=True)


def _fine_tune(settings: WarmStart, runtime: policy_runtime.Runtime, source: Path, display: Display) -> Policy:
    """Run the SFT steps from the weights in `source`; every step uses new demonstrations."""
    if problems := list(model_layout_problems(settings.policy, read_model_shape(source))):
        raise ConfigError.listing("the layout does not fit the model", problems)
    on_first_rank(lambda: check_folder(source, settings.family), f"{source} cannot be read", UserError)
    sequences = _sequences(settings, load_tokenizer(str(source)))
    steps, count = settings.steps, settings.demonstrations_per_step
    policy = Policy(
        source,
        settings.policy,
        OptimizerConfig(learning_rate=settings.learning_rate, schedule="cosine", warmup_updates=steps // 20),
        runtime,
        temperature=1.0,
        tokens_per_microbatch=settings.tokens_per_microbatch,
        total_updates=steps,
        family=settings.family,
    )
    display.begin(WARM_START, 0, steps)
    for step in range(steps):
        batch = sequences[step * count : (step + 1) * count]
        totals = UpdateTotals(tokens=sum(len(s.response) for s in batch), responses=len(batch))

        def loss(logprobs: torch.Tensor, entropy, packed, totals=totals):
            return supervised_loss(logprobs, row_mask(packed), totals=totals)

        result, metrics, _ = policy.update(batch, loss)
        if not result.applied:
            raise UserError(
                f"step {step + 1}: loss {metrics['loss']} or gradient norm {result.gradient_norm} is not finite; lower "
                f"learning_rate={settings.learning_rate:g}"
            )
        display.show(step + 1, {"warm_start/loss": metrics["loss"]})
    return policy


def _sequences(settings: WarmStart, tokenizer: PreTrainedTokenizerBase) -> list[TokenSequence]:
    """The demonstrations of all steps."""
    for missing in ("chat_template", "eos_token"):
        if getattr(tokenizer, missing) is None:
            raise UserError(f"model.path={settings.model.path}: its tokenizer has no {missing}; use a chat model")
    count = settings.steps * settings.demonstrations_per_step
    examples = mixed_demonstrations([TASKS[name] for name in settings.tasks], tokenizer, count, settings.seed)
    sequences = [TokenSequence(prompt.token_ids, tuple(response)) for prompt, response in examples]
    longest = max(sequence.length for sequence in sequences)
    if longest > settings.tokens_per_microbatch:
        raise ConfigError(
            f"tokens_per_microbatch={settings.tokens_per_microbatch} is less than the {longest} tokens of the longest "
            "worked example: raise it"
        )
    return sequences
