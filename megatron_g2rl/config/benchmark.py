"""Benchmarks: small YAML files that declare an evaluation set and how it is scored (docs/evaluation.md).

The shipped ones are in `evaluation/benchmarks`; the name of the file is the name of the benchmark. A file of the user
is given by its path. `builtin:NAME` is the test split of a built-in task, without a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.inputs import BUILTIN
from megatron_g2rl.config.reading import Format, read_model
from megatron_g2rl.config.sections.base import (
    AnswerPattern,
    Fraction,
    FunctionPath,
    Metric,
    Name,
    NonNegative,
    NonNegativeFloat,
    Positive,
    Section,
)
from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.config.sections.evaluation import EvaluationConfig
from megatron_g2rl.config.tree import Config
from megatron_g2rl.registry import TASKS

SHIPPED = Path(__file__).parents[1] / "evaluation" / "benchmarks"
OWN_SET = "evaluation"
"""Name of the results on a configuration's own evaluation set; no benchmark has it."""
MATH_REWARD, CHOICE_REWARD = "megatron_g2rl.rewards:math_reward", "megatron_g2rl.rewards:choice_reward"
TASK_REWARD = "megatron_g2rl.rewards:task_reward"
DISTINCT = "distinct_correct_at_"
"""Prefix of the metrics that count canonical forms: numbers of solutions, not fractions."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class Benchmark(Section):
    """An evaluation set: where its problems are, how they are asked, and what is measured."""

    source: Name
    """A Hub name, a local file or folder, or `builtin:NAME`, as `data.source`."""
    subset: str | None = None
    """Configuration name of a Hub dataset."""
    split: str = "test"
    """Split of a Hub dataset or folder."""
    prompt_column: str = "problem"
    """Column with the problem."""
    answer_column: str = "answer"
    """Column with the reference answer."""
    answer_regex: AnswerPattern | None = None
    """How to extract the reference from its column, as `data.answer_regex`."""
    choices: tuple[str, ...] = ()
    """Multiple choice: one column with the list of options (the answer column has the letter or index of the correct
    one), or one column for each option (the answer column is one of them, and the options are shuffled)."""
    prompt: str = "{problem}"
    """The user message: `{problem}` is replaced by the problem, `{choices}` by the lettered options."""
    system_prompt: str | None = None
    """The system message; null: that of the configuration."""
    answer: Literal["boxed", "letter"] = "boxed"
    """The final answer of a response: the last box, or the letter of an option, in a box or after "answer"."""
    reward: FunctionPath | None = None
    """Function that decides whether a response is correct; null: the verifier of mathematical answers, or for letters
    their equality."""
    metrics: tuple[Metric, ...] = ("pass@1", "maj@16", "pass@16")
    """What is measured: `pass@K`, `maj@K`, `mean@K`, for K up to `samples`."""
    samples: Positive = 16
    """Responses to each problem."""
    temperature: NonNegativeFloat = 0.8
    """Sampling temperature; 0: greedy decoding."""
    top_p: Fraction = 1.0
    """Nucleus sampling: total probability of the tokens that can be sampled; 1: all."""
    top_k: NonNegative = 0
    """Number of most probable tokens that can be sampled; 0: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Smallest probability of a token that can be sampled, relative to the most probable one; 0: no limit."""
    problems: Positive | None = None
    """Number of problems, the same selection every time; null: all of them."""
    max_prompt_tokens: Positive | None = None
    """Longer prompts are an error; null: as the configuration."""
    max_response_tokens: Positive | None = None
    """Responses are truncated after this many tokens; null: as the configuration."""

    @property
    def reward_function(self) -> str:
        """The function that decides whether a response is correct."""
        return self.reward or (CHOICE_REWARD if self.answer == "letter" else MATH_REWARD)

    def data(self, config: Config) -> DataConfig:
        """The data settings of its problems: its own, and those of the configuration's evaluations for the rest."""
        base = config.evaluation.data(config.data) if config.evaluation else config.data
        names = ("source", "subset", "split", "prompt_column", "answer_column", "answer_regex")
        updates = {name: getattr(self, name) for name in names} | {"sources": (), "max_rows": None}
        for name in ("system_prompt", "max_prompt_tokens"):
            if getattr(self, name) is not None:
                updates[name] = getattr(self, name)
        return base.model_copy(update=updates)

    def response_tokens(self, config: Config) -> int:
        """The length at which responses are truncated."""
        own = config.evaluation.max_response_tokens if config.evaluation else None
        return self.max_response_tokens or own or config.rollout.max_response_tokens


def own_evaluation(settings: EvaluationConfig) -> Benchmark:
    """The own evaluation set of a configuration as a benchmark; its `data` is not used."""
    n = settings.responses_per_prompt
    return Benchmark(
        source=settings.source or "data.source",
        metrics=tuple(dict.fromkeys(("pass@1", f"pass@{n}", f"maj@{n}", *settings.metrics))),
        samples=n,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        problems=settings.prompts,
        max_response_tokens=settings.max_response_tokens,
    )


def shipped_benchmarks() -> list[str]:
    """Names of the benchmarks that are part of this package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_benchmarks(names: Sequence[str]) -> dict[str, Benchmark]:
    """The benchmarks of these names or files, by their names.

    Raises:
        ConfigError: lists every unknown name and every problem of every file.
    """
    benchmarks: dict[str, Benchmark] = {}
    problems: list[str] = []
    for name in names:
        try:
            label, file = _find(name)
            if label in benchmarks:
                raise ConfigError(f"benchmark {label} is given twice: give each file a different name")
            benchmarks[label] = _of_task(label) if file is None else read_model(_FORMAT, file)[0]
        except ConfigError as error:
            problems.extend(error.problems)
            continue
        problems += [f"{file}: {problem}" for problem in setting_problems(benchmarks[label])]
    if problems:
        raise ConfigError.listing("the benchmarks cannot be used", problems)
    return benchmarks


def with_options(benchmark: Benchmark, options: dict[str, int | float | None]) -> Benchmark:
    """A copy with other values of `samples`, `temperature` and so on; None: unchanged.

    With fewer samples, metrics of more are replaced by those of the new number.

    Raises:
        ConfigError: the combination is impossible.
    """
    changed = {name: value for name, value in options.items() if value is not None}
    new = benchmark.model_copy(update=changed)
    metrics = (f"{kind}@{min(k, new.samples)}" for kind, k in map(split_metric, benchmark.metrics))
    new = Benchmark.model_validate(new.model_dump() | {"metrics": tuple(dict.fromkeys(metrics))})
    if problems := list(setting_problems(new)):
        raise ConfigError("; ".join(problems))
    return new


def split_metric(metric: str) -> tuple[str, int]:
    """`pass@16` -> ("pass", 16)."""
    kind, _, k = metric.partition("@")
    return kind, int(k)


def unmeasurable(benchmark: Benchmark) -> str:
    """The metrics of more responses than there are, separated by commas."""
    return ", ".join(metric for metric in benchmark.metrics if split_metric(metric)[1] > benchmark.samples)


def setting_problems(benchmark: Benchmark) -> Iterator[str]:
    """Combinations of settings that are impossible or have no meaning."""
    if large := unmeasurable(benchmark):
        yield f"metrics: {large} of more responses than samples={benchmark.samples}: raise samples"
    if benchmark.temperature == 0 and benchmark.samples > 1:
        yield f"temperature=0 gives the same response {benchmark.samples} times: set samples=1 or a higher temperature"
    if benchmark.temperature == 0 and (benchmark.top_p, benchmark.top_k, benchmark.min_p) != (1.0, 0, 0.0):
        yield "temperature=0 always takes the most probable token: top_p, top_k and min_p have no effect; remove them"
    if "{problem}" not in benchmark.prompt:
        yield "prompt has no {problem}: every prompt would be the same; add it where the problem goes"
    if ("{choices}" in benchmark.prompt) != bool(benchmark.choices):
        yield "prompt needs {choices} where the options go if choices is set, and only then"
    if len(benchmark.choices) > 1 and benchmark.answer_column not in benchmark.choices:
        yield f"answer_column={benchmark.answer_column} must be one of choices, which name the column of each option"


def _of_task(name: str) -> Benchmark:
    """256 problems of the test split of a built-in task, sampled at temperature 1 as in training."""
    return Benchmark(
        source=f"{BUILTIN}{name}",
        reward=TASK_REWARD,
        metrics=("pass@1", "maj@8", "pass@8", "pass@32"),
        samples=32,
        temperature=1.0,
        problems=256,
    )


def _find(name: str) -> tuple[str, Path | None]:
    """Name and file of a shipped benchmark or of a file of the user; the file is None for a built-in task.

    Raises:
        ConfigError: there is none.
    """
    if name.startswith(BUILTIN):
        task = name.removeprefix(BUILTIN)
        if task not in TASKS:
            raise ConfigError(f"no built-in task {task!r}; available: {', '.join(TASKS)}")
        return task, None
    file = Path(name).expanduser()
    if name.endswith((".yaml", ".yml")) or file.is_file():
        if not file.is_file():
            raise ConfigError(f"there is no benchmark file {name} (relative paths start at {Path.cwd()})")
        if file.stem == OWN_SET:
            raise ConfigError(f"{name}: the name {OWN_SET} is that of the configuration's own set; rename the file")
        if not _NAME.fullmatch(file.stem):
            raise ConfigError(f"{name}: the name of a benchmark has letters, digits, '_', '-' and '.' only")
        return file.stem, file
    known = shipped_benchmarks()
    if name in known:
        return name, SHIPPED / f"{name}.yaml"
    near = get_close_matches(name, known, 1)
    suggestion = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"unknown benchmark {name!r}: the known ones are {', '.join(known)}, or give a .yaml file or {BUILTIN}TASK"
        f"{suggestion}"
    )


_FORMAT = Format(Benchmark, "is not a valid benchmark")
