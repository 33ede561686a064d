"""Evaluation on a separate problem set with a rollout engine and reward functions, in training and for a checkpoint.

Every evaluation uses the same prompts, so that its metrics can be compared across steps and runs. Every rank runs this
code; generation and scoring are collectives.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack

from transformers import PreTrainedTokenizerBase

from megatron_g2rl.config import Config
from megatron_g2rl.config.benchmark import Benchmark, own_evaluation
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.sections.rewards import RewardConfig
from megatron_g2rl.data.prompts import PromptStream, load_prompts
from megatron_g2rl.data.references import References
from megatron_g2rl.data.sources import DataError
from megatron_g2rl.evaluation.multiple_choice import rewriter
from megatron_g2rl.evaluation.summary import Evaluation
from megatron_g2rl.records import Prompt
from megatron_g2rl.rewards.distribute import DistributedRewards
from megatron_g2rl.rewards.verifier import MATH_REWARD
from megatron_g2rl.rollout.endings import Endings, count_as_complete
from megatron_g2rl.rollout.engine import RolloutEngine, RolloutRequest, Sampling, Stop

OWN_SET_LABEL = "evaluation set (keys of `evaluation` override those of `data`)"
"""The own evaluation set of a run in messages."""
_DATA_KEY = re.compile(r"(?<![\w./-])data\.(?=(?:source|subset|split|prompt_column|answer_column|answer_regex)\b)")
"""In messages about a benchmark: the prefix of keys that the benchmark's file has without it."""
SELECTION_SEED = 0
"""Seed that selects prompts of a large source; independent of `run.seed`, so that runs can be compared."""


class Evaluator:
    """Generates, scores and summarizes responses to the prompts of one evaluation set."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        rewards: DistributedRewards,
        benchmark: Benchmark | None = None,
        name: str = "",
    ):
        """Evaluate on `prompts` (from `load_own_set` or `load_benchmark`).

        Args:
            config: the run's configuration.
            prompts: the problems.
            rewards: reward functions of this set.
            benchmark: sampling settings and metrics; None: those of `config.evaluation`, which must be set.
            name: name of the set in metric names; "": the run's own set.
        """
        self.config = config
        self.prompts = prompts
        self.rewards = rewards
        self.benchmark = benchmark or own_evaluation(config.evaluation)
        self.name = name

    def sampling(self, steps_done: int) -> Sampling:
        """Sampling settings after `steps_done` steps."""
        return Sampling(
            group_size=self.benchmark.samples,
            temperature=self.benchmark.temperature,
            max_response_tokens=self.benchmark.response_tokens(self.config),
            run_seed=self.config.run.seed,
            step=steps_done,
            stream="eval",
            top_p=self.benchmark.top_p,
            top_k=self.benchmark.top_k,
            min_p=self.benchmark.min_p,
        )

    def evaluate(
        self, rollout: RolloutEngine, steps_done: int, endings: Endings, stop: Stop | None = None
    ) -> Evaluation:
        """Generate and score the responses of an evaluation after `steps_done` training steps; a collective.

        Args:
            rollout: the rollout engine, awake and with the current weights; it stays awake.
            steps_done: training steps of the current weights.
            endings: which responses are complete.
            stop: ends generation when it returns True.

        Raises:
            RolloutStopped: `stop` returned True; a repeated evaluation with the same weights gives the same metrics.
        """
        groups = rollout.generate(RolloutRequest(self.prompts, self.sampling(steps_done), stop=stop))
        complete = count_as_complete(groups, endings, self.config.rollout.incomplete_responses)
        scored = self.rewards.score(groups, complete)
        timeouts = int(self.rewards.read_metrics()["reward/timeouts"])
        return Evaluation.of(groups, scored.correct.tolist(), self.benchmark.answer, timeouts, scored.forms)

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        """The `evaluation/...` metrics of an evaluation, with the name of the set if it has one."""
        return {self.prefix + name: value for name, value in evaluation.metrics(self.benchmark.metrics).items()}

    @property
    def prefix(self) -> str:
        """Prefix of the names of its metrics."""
        return f"evaluation/{self.name}/" if self.name else "evaluation/"


def load_own_set(
    config: Config, tokenizer: PreTrainedTokenizerBase, columns: Collection[str] = (), needed: Collection[str] = ()
) -> list[Prompt]:
    """The prompts of a run's own evaluation set; `config.evaluation` must be set.

    Args:
        config: the run's configuration.
        tokenizer: the model's tokenizer.
        columns: data columns that the reward functions accept.
        needed: those of them that the reward functions require.

    Raises:
        DataError: they cannot be read or rendered, or lack a needed column.
        ConfigError: there are fewer than `evaluation.prompts`.
    """
    settings = config.evaluation
    data = settings.data(config.data)
    try:
        dataset = load_prompts(data, tokenizer, columns)
        if missing := sorted(set(needed) - dataset.column_names):
            present = ", ".join(sorted(dataset.column_names))
            required = f"{', '.join(missing)}, which {config.reward.key} takes"
            raise DataError(f"{data.label} has no column {required}; it has {present}")
        if config.reward.uses(MATH_REWARD) and dataset.report.prose.count:
            References(len(dataset), dataset.report.prose).check(data)
    except DataError as error:
        raise DataError(f"{OWN_SET_LABEL}: {error}") from error
    return _selected(dataset, settings.prompts, "evaluation.prompts", "the evaluation set")


def benchmark_rewards(
    settings: RewardConfig, benchmarks: Mapping[str, Benchmark], opened: ExitStack
) -> dict[str, DistributedRewards]:
    """Start the reward workers of every benchmark; the built-in functions have the same workers for all of them.

    Args:
        settings: number of workers and time limit; the functions are those of the benchmarks.
        benchmarks: benchmarks by name.
        opened: gets a callback that stops the workers.

    Raises:
        RewardError: a reward function cannot be loaded.
    """
    shared: dict[str, DistributedRewards] = {}
    rewards: dict[str, DistributedRewards] = {}
    for name, benchmark in benchmarks.items():
        function = benchmark.reward_function
        if function not in shared:
            keys = {key: getattr(settings, key) for key in ("workers", "deadline_s", "batch_size")}
            started = DistributedRewards(RewardConfig(function=function, **keys))
            opened.callback(started.close)
            if benchmark.reward is None:
                shared[function] = started
            rewards[name] = started
        else:
            rewards[name] = shared[function]
    return rewards


def load_benchmark(
    config: Config,
    name: str,
    benchmark: Benchmark,
    tokenizer: PreTrainedTokenizerBase,
    rewards: DistributedRewards,
) -> list[Prompt]:
    """The prompts of a benchmark.

    Args:
        config: the run's configuration, for what the benchmark leaves open.
        name: name of the benchmark, for messages.
        benchmark: the benchmark.
        tokenizer: the model's tokenizer.
        rewards: its reward functions, which are bound to the columns of the data here.

    Raises:
        DataError: the problems cannot be read or rendered, or lack a column.
        ConfigError: there are fewer than `problems`.
        RewardError: a parameter of the reward function is neither a known name nor a column.
    """
    tops = {column.partition(".")[0] for column in benchmark.choices}
    columns = tops | set(benchmark.choices) | rewards.possible_columns
    data = benchmark.data(config)
    try:
        dataset = load_prompts(data, tokenizer, columns, rewriter(benchmark))
        if benchmark.reward_function == MATH_REWARD and dataset.report.prose.count:
            References(len(dataset), dataset.report.prose).check(data)
    except DataError as error:
        raise DataError(f"benchmark {name}: {_DATA_KEY.sub('', str(error))}") from error
    rewards.bind(dataset.column_names)
    return _selected(dataset, benchmark.problems, "problems", f"benchmark {name}")


def _selected(dataset: Sequence[Prompt], count: int | None, key: str, label: str) -> list[Prompt]:
    """All prompts, or the same `count` of them every time.

    Raises:
        ConfigError: there are fewer.
    """
    if count is None:
        return list(dataset)
    if count > len(dataset):
        raise ConfigError(
            f"{key}={count}, but {label} has only {len(dataset)} usable prompts: lower it to {len(dataset)} or less, "
            "or set it to null for all"
        )
    return PromptStream(dataset, SELECTION_SEED).next(count)
