"""Evaluates saved models on benchmarks, with the code of the evaluations during training.

    g2rl evaluate CONFIG --checkpoint runs/mine --benchmark aime24,math500

Every rank generates a part of the responses. Finished groups are journaled, so that the same command resumes an
interrupted evaluation; results that are complete are not computed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_g2rl.config import Config
from megatron_g2rl.config.benchmark import DISTINCT, OWN_SET, Benchmark, own_evaluation
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.evaluated import EvaluatedModel, training_settings
from megatron_g2rl.config.model_shape import read_model_shape
from megatron_g2rl.config.run_files import STOPPED
from megatron_g2rl.data.prompts import check_embedding
from megatron_g2rl.distributed.collectives import on_first_rank
from megatron_g2rl.distributed.heartbeat import Heartbeat
from megatron_g2rl.distributed.hub import fetch_model
from megatron_g2rl.errors import UserError, as_disk_error, as_lost_rank_error
from megatron_g2rl.evaluation.evaluate import Evaluator, benchmark_rewards, load_benchmark, load_own_set
from megatron_g2rl.evaluation.results import read_summary, summary, write_results
from megatron_g2rl.evaluation.summary import Evaluation
from megatron_g2rl.policy import runtime
from megatron_g2rl.records import Prompt, ResponseGroup
from megatron_g2rl.rewards.distribute import DistributedRewards
from megatron_g2rl.rollout import make_engine, vllm_compat
from megatron_g2rl.rollout.endings import read_endings
from megatron_g2rl.rollout.engine import RolloutEngine, RolloutRequest, RolloutStopped, WrappedEngine
from megatron_g2rl.rollout.journal import JournaledRollout
from megatron_g2rl.rollout.tokenizer import load_tokenizer
from megatron_g2rl.training.contents import folder_digest, rows_digest
from megatron_g2rl.training.stopping import StopRequest, end_on_signals

log = logging.getLogger(__name__)

PROGRESS_S = 60.0
"""Seconds between two reports of progress."""
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JOURNAL = "rollouts"
"""Folder of the journal beside the results, removed when they are complete."""


@dataclass(frozen=True)
class _Task:
    """One model on one benchmark."""

    evaluator: Evaluator
    folder: Path
    """Folder of the results."""
    identity: str
    """Digest of everything that determines the results."""


def evaluate(
    config: Config,
    models: Sequence[EvaluatedModel],
    benchmarks: Mapping[str, Benchmark],
    output: Path,
    *,
    own_set: bool = False,
) -> int:
    """Evaluate every model on every benchmark; a collective of all ranks.

    Args:
        config: the configuration; sampling lengths, templates, engine and seed are taken from it.
        models: the models.
        benchmarks: benchmarks by name.
        output: folder of the results, with one subfolder per model and, in it, per benchmark.
        own_set: also evaluate on the configuration's own evaluation set.

    Returns:
        Exit code: 0 if complete, `STOPPED` if the same command resumes it.

    Raises:
        UserError: an input is invalid, all problems in one message, before a model is loaded.
    """
    identity = f"{output.absolute()}\n{[model.path for model in models]}\n{sorted(benchmarks)}"
    device = runtime.join(config.policy.device, identity)
    end_on_signals()
    if config.rollout.engine == "vllm":
        vllm_compat.check_version()
    try:
        with ExitStack() as opened, Heartbeat():
            sets = dict(benchmarks)
            if own_set:
                sets = {OWN_SET: own_evaluation(config.evaluation)} | sets
            return _Command(config, models, sets, output, device, opened).run()
    except OSError as error:
        raise as_disk_error(error, output) from error
    except RuntimeError as error:
        raise as_lost_rank_error(error) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class _Command:
    """The work of one command on this rank."""

    def __init__(
        self,
        config: Config,
        models: Sequence[EvaluatedModel],
        benchmarks: Mapping[str, Benchmark],
        output: Path,
        device: torch.device,
        opened: ExitStack,
    ) -> None:
        self.config = config
        self.models = models
        self.benchmarks = benchmarks
        self.output = output
        self.device = device
        self.rewards = self._rewards(opened)
        """Reward functions by benchmark."""

    def _rewards(self, opened: ExitStack) -> dict[str, DistributedRewards]:
        files = {name: benchmark for name, benchmark in self.benchmarks.items() if name != OWN_SET}
        rewards = benchmark_rewards(self.config.reward, files, opened)
        if OWN_SET in self.benchmarks:
            rewards[OWN_SET] = DistributedRewards(self.config.reward)
            opened.callback(rewards[OWN_SET].close)
        return rewards

    def run(self) -> int:
        """Check all inputs, then evaluate model by model; returns the exit code."""
        folders = [fetch_model(model.path, f"--checkpoint {model.path}") for model in self.models]
        tasks = [self._tasks(model, folder) for model, folder in zip(self.models, folders, strict=True)]
        stop = StopRequest(self.device)
        for model, folder, own_tasks in zip(self.models, folders, tasks, strict=True):
            try:
                self._evaluate(model, folder, own_tasks, stop)
            except RolloutStopped:
                log.info("stopped; run the same command again to resume")
                return STOPPED
        return 0

    def _tasks(self, model: EvaluatedModel, folder: Path) -> list[_Task]:
        """Load and render the problems of all benchmarks for this model; returns the tasks that are not complete.

        Raises:
            ConfigError: lists the problems of all benchmarks.
        """
        tokenizer = load_tokenizer(str(folder))
        shape = read_model_shape(str(folder))
        digest = on_first_rank(lambda: folder_digest(folder))
        tasks, problems = [], []
        for name, benchmark in self.benchmarks.items():
            try:
                prompts = self._prompts(name, benchmark, tokenizer)
                check_embedding(prompts, tokenizer, shape.vocab_size)
            except UserError as error:
                problems.extend(error.problems if isinstance(error, ConfigError) else [str(error)])
                continue
            problems += self._length_problems(name, benchmark, shape.max_positions)
            evaluator = Evaluator(self.config, prompts, self.rewards[name], benchmark, name)
            identity = self._identity(model, digest, evaluator)
            tasks.append(_Task(evaluator, self.output / model.label / name, identity))
        if problems:
            raise ConfigError.listing(f"{model.path} cannot be evaluated", problems)
        return [task for task in tasks if not on_first_rank(lambda task=task: self._is_complete(task))]

    def _length_problems(self, name: str, benchmark: Benchmark, limit: int) -> list[str]:
        """The problem if the longest prompt and response together exceed the model's `limit` of positions."""
        settings = self.config.evaluation
        data = settings.data(self.config.data) if name == OWN_SET else benchmark.data(self.config)
        prompt, response = data.max_prompt_tokens, benchmark.response_tokens(self.config)
        if prompt + response <= limit:
            return []
        return [
            f"{name}: {prompt} prompt tokens and {response} response tokens exceed the model's "
            f"max_position_embeddings={limit}: lower rollout.max_response_tokens or the benchmark's own limits"
        ]

    def _prompts(self, name: str, benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        rewards = self.rewards[name]
        if name != OWN_SET:
            return load_benchmark(self.config, name, benchmark, tokenizer, rewards)
        prompts = load_own_set(self.config, tokenizer, rewards.possible_columns)
        rewards.bind({column for prompt in prompts for column in prompt.columns})
        return prompts

    def _identity(self, model: EvaluatedModel, digest: str, evaluator: Evaluator) -> str:
        rollout = self.config.rollout
        settings = [
            digest,
            vars(evaluator.sampling(model.step)),
            evaluator.benchmark.model_dump(mode="json"),
            rows_digest(evaluator.prompts),
            [rollout.engine, rollout.stop, rollout.incomplete_responses, self.config.policy.precision],
            self.config.reward.model_dump(mode="json", exclude={"workers"}) if evaluator.name == OWN_SET else None,
        ]
        return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()

    @staticmethod
    def _is_complete(task: _Task) -> bool:
        """Whether the results exist.

        Raises:
            ConfigError: results of another model or other settings are in the folder.
        """
        found = read_summary(task.folder)
        if found is None:
            return False
        if found.get("identity") != task.identity:
            raise ConfigError(
                f"{task.folder} has the results of another model or of other settings: choose another --output, or "
                "remove that folder"
            )
        log.info("%s is complete: %s", task.folder, described(found))
        return True

    def _evaluate(self, model: EvaluatedModel, folder: Path, tasks: Sequence[_Task], stop: StopRequest) -> None:
        """Evaluate one model on all benchmarks that are not complete."""
        if not tasks:
            return
        with ExitStack() as opened:
            converted = self.output / model.label / "converted"
            weights = hf_folder(model, folder, converted, self.config.model.family, opened, stop.requested_here)
            endings = read_endings(self.config, str(weights), load_tokenizer(str(weights)))
            engine = make_engine(self.config, str(weights), self.device, endings)
            opened.callback(engine.close)
            if self.config.rollout.engine != "transformers":  # the others start without weights
                load_folder(engine, weights)
            for task in tasks:
                journal = task.folder / JOURNAL
                on_first_rank(lambda journal=journal: journal.mkdir(parents=True, exist_ok=True))
                log.info("evaluating %s on %d problems (%s)", model.label, len(task.evaluator.prompts), task.folder)
                vocabulary = read_model_shape(str(weights)).vocab_size
                rollout = _WithProgress(JournaledRollout(engine, journal, task.identity, vocabulary))
                evaluation = task.evaluator.evaluate(rollout, model.step, endings, stop.requested_here)
                on_first_rank(lambda task=task, evaluation=evaluation: self._write(model, task, evaluation))

    def _write(self, model: EvaluatedModel, task: _Task, evaluation: Evaluation) -> None:
        benchmark = task.evaluator.benchmark
        about: dict[str, Any] = {
            "benchmark": task.folder.name,
            "model": model.label,
            "path": model.path,
            "step": model.step,
            "engine": self.config.rollout.engine,
            "seed": self.config.run.seed,
            "max_response_tokens": benchmark.response_tokens(self.config),
            "identity": task.identity,
            "training": training_settings(model.path),
        }
        content = summary(evaluation, benchmark, about)
        write_results(task.folder, evaluation, content)
        shutil.rmtree(task.folder / JOURNAL, ignore_errors=True)
        log.info("%s on %s: %s", model.label, task.folder.name, described(content))


class _WithProgress(WrappedEngine):
    """Logs once a minute how many problems this rank has finished."""

    def generate(self, request: RolloutRequest) -> list[ResponseGroup]:
        """Generate as the wrapped engine does."""
        start = last = time.monotonic()
        finished = 0

        def count(group: ResponseGroup) -> None:
            nonlocal last, finished
            finished += 1
            if time.monotonic() - last >= PROGRESS_S:
                last = time.monotonic()
                total = -(-len(request.prompts) // dist.get_world_size())
                log.info("%d of about %d problems of rank 0 after %.0f s", finished, total, last - start)

        return self._engine.generate(replace(request, on_group=count))


def described(content: Mapping[str, Any]) -> str:
    """The main numbers of a summary as one line."""
    parts = []
    for name, value in content["metrics"].items():
        if "_at_" in name:
            low, high = content["intervals"][name]
            style = ".2f" if name.startswith(DISTINCT) else ".1%"
            parts.append(f"{name.replace('_at_', '@')} {value:{style}} ({low:{style}} to {high:{style}})")
    metrics = content["metrics"]
    parts.append(f"tokens {metrics['response_length_mean']:.0f}, truncated {metrics['truncated_fraction']:.1%}")
    return " | ".join([*parts, f"unparsed {metrics['unparsed_fraction']:.1%}"])


def hf_folder(
    model: EvaluatedModel,
    folder: Path,
    target: Path,
    family: str | None,
    opened: ExitStack,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """The Hugging Face folder of a model; a Megatron folder is converted to `target`, which is removed later.

    A collective.

    Raises:
        RolloutStopped: `stop` returned True on rank 0 during the conversion.
    """
    if not model.is_megatron:
        return folder
    if dist.get_rank() == 0:
        opened.callback(shutil.rmtree, target, ignore_errors=True)
    log.info("converting %s", folder)
    if not on_first_rank(lambda: convert(folder, target, family, stop)):
        raise RolloutStopped
    return target


_CONVERT = """
import signal, sys
from megatron_g2rl.distributed.orphans import signal_when_parent_ends
signal_when_parent_ends(int(sys.argv.pop(1)), signal.SIGKILL)
from megatron_g2rl.cli import main
main()
"""
"""Runs `g2rl` with the arguments after the first, which is the process id of the rank that it must not outlive."""


def convert(folder: Path, target: Path, family: str | None, stop: Callable[[], bool] = lambda: False) -> bool:
    """Convert a Megatron folder to a Hugging Face folder, in a process without process groups, as planning requires.

    The process receives no signals that are sent to the ranks, and ends with this one.

    Args:
        folder: the Megatron folder.
        target: the folder to write.
        family: `model.family`.
        stop: called twice a second; whether to stop.

    Returns:
        Whether the folder is complete; False if the conversion was stopped.

    Raises:
        UserError: the conversion failed; its message.
    """
    command = [sys.executable, "-c", _CONVERT, str(os.getpid()), "convert", "megatron-to-hf", str(folder), str(target)]
    command += ["--overwrite", *([] if family is None else ["--family", family])]
    environment = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            while True:
                try:
                    _, errors = process.communicate(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    if stop():
                        return False
        finally:
            process.kill()
    if process.returncode:
        raise UserError(errors.strip() or f"the conversion of {folder} ended with code {process.returncode}")
    return True


def load_folder(engine: RolloutEngine, folder: Path) -> None:
    """Load the weights of a Hugging Face folder into an engine, one tensor at a time."""
    from megatron_g2rl.policy.hf.tensor_folder import TensorFolder

    tensors = TensorFolder(folder)
    engine.load_weights((name, tensors.read(name)) for name in tensors.headers())
