"""`g2rl evaluate`: checks names, settings and files before torch is imported, then starts the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_g2rl.commands.imports import without_collections
from megatron_g2rl.commands.on_ranks import run_on_ranks
from megatron_g2rl.config import Config
from megatron_g2rl.config.benchmark import (
    Benchmark,
    own_evaluation,
    read_benchmarks,
    setting_problems,
    shipped_benchmarks,
    with_options,
)
from megatron_g2rl.config.checks import check_rollout_machine
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.evaluated import EvaluatedModel, find_models
from megatron_g2rl.config.inputs import BUILTIN, prompt_file_problems
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.sections.evaluation import EvaluationConfig
from megatron_g2rl.config.world import undivided_ranks, world_size

T = TypeVar("T")


@dataclass(frozen=True)
class EvaluationCommand:
    """A checked command line."""

    config: Config
    """The configuration, with the benchmarks as its evaluation sets: engines have room for their lengths."""
    models: tuple[EvaluatedModel, ...]
    benchmarks: dict[str, Benchmark]
    """Benchmarks by name."""
    own_set: bool
    """Whether the configuration's own evaluation set is evaluated too."""
    output: Path


def check_command(
    config_path: Path,
    overrides: Sequence[str],
    checkpoints: Sequence[str],
    names: Sequence[str],
    output: Path,
    options: dict[str, int | float | None],
) -> EvaluationCommand:
    """Read the configuration and the benchmarks, and look for the models.

    Args:
        config_path: the configuration.
        overrides: keys to set in it.
        checkpoints: `--checkpoint`; empty: `model.path`.
        names: `--benchmark`, names separated by commas; empty: the evaluation sets of the configuration.
        output: folder of the results.
        options: settings that replace those of every benchmark; None: unchanged.

    Raises:
        ConfigError: everything that is wrong, in one message.
    """
    problems: list[str] = []

    def collect(work: Callable[[], T], otherwise: T) -> T:
        try:
            return work()
        except ConfigError as error:
            problems.extend(error.problems)
            return otherwise

    config = load_config(config_path, overrides)
    written = [name.strip() for part in names for name in part.split(",") if name.strip()]
    own_set = not written and config.evaluation is not None and config.evaluation.has_own_set
    named = written or (config.evaluation.benchmarks if config.evaluation else ())
    benchmarks = collect(lambda: read_benchmarks(named), {})
    models = collect(lambda: find_models(checkpoints or [config.model.path]), [])
    for name, benchmark in benchmarks.items():
        benchmarks[name] = collect(lambda b=benchmark: with_options(b, options), benchmark)
        if not benchmark.source.startswith(BUILTIN):
            problems += prompt_file_problems(f"benchmark {name}: source", benchmark.source)
    if own_set:
        problems += (f"evaluation: {problem}" for problem in setting_problems(own_evaluation(config.evaluation)))
    if not written and config.evaluation is None:
        problems.append(f"nothing to evaluate: give --benchmark, such as {', '.join(shipped_benchmarks())}")
    if not written and any(value is not None for value in options.values()):
        problems.append(
            "--samples and the other sampling options belong to --benchmark: set keys of evaluation instead"
        )
    if output.exists() and not output.is_dir():
        problems.append(f"--output {output} is a file: give a folder")
    if problem := undivided_ranks(config.rollout.tensor_parallel, world_size(config)):
        problems.append(problem)
    problems += check_rollout_machine(config)
    if problems:
        raise ConfigError.listing("the evaluation cannot start", problems)
    if written:
        settings = config.evaluation or EvaluationConfig()
        config = config.model_copy(update={"evaluation": settings.model_copy(update={"benchmarks": tuple(written)})})
    return EvaluationCommand(config, tuple(models), benchmarks, own_set, output)


def run_command(command: EvaluationCommand, arguments: Sequence[str]) -> int:
    """Evaluate on all ranks; returns the exit code.

    Args:
        command: what to evaluate.
        arguments: of `g2rl`, for the ranks.
    """
    config = command.config

    def work() -> int:
        with without_collections():
            from megatron_g2rl.commands.offline_evaluation import evaluate

        return evaluate(config, command.models, command.benchmarks, command.output, own_set=command.own_set)

    return run_on_ranks(work, config.trainer.ranks, arguments, config.policy.device, command.output)
