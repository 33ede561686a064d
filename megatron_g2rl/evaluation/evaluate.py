"""Evaluation on a separate problem set with the run's own rollout engine and reward functions.

Every evaluation uses the same prompts, so that its metrics can be compared across steps and runs. Every rank runs this
code; generation and scoring are collectives.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from megatron_g2rl.config import Config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.data.prompts import PromptStream, load_prompts
from megatron_g2rl.data.references import References
from megatron_g2rl.data.sources import DataError
from megatron_g2rl.evaluation.estimators import majority_at_k, mean_at_k, pass_at_k
from megatron_g2rl.records import Prompt, ResponseGroup
from megatron_g2rl.rewards.boxed import last_boxed
from megatron_g2rl.rewards.distribute import DistributedRewards
from megatron_g2rl.rewards.verifier import MATH_REWARD
from megatron_g2rl.rollout.endings import Endings, count_as_complete
from megatron_g2rl.rollout.engine import RolloutEngine, RolloutRequest, Sampling, Stop

HELD_OUT = "evaluation set (keys of `evaluation` override those of `data`)"
"""Prefix of messages about the evaluation data."""
SELECTION_SEED = 0
"""Seed that selects prompts of a large source; independent of `run.seed`, so that runs can be compared."""


class Evaluator:
    """Generates, scores and summarizes responses to the evaluation prompts."""

    def __init__(self, config: Config, prompts: Sequence[Prompt]):
        """Evaluate on `prompts` (from `load_held_out`) with the settings of `config.evaluation`, which must be set."""
        self.config, self.prompts = config, prompts

    def sampling(self, steps_done: int) -> Sampling:
        """Sampling settings after `steps_done` steps."""
        settings, rollout = self.config.evaluation, self.config.rollout
        return Sampling(
            group_size=settings.responses_per_prompt,
            temperature=settings.temperature,
            max_response_tokens=settings.max_response_tokens or rollout.max_response_tokens,
            run_seed=self.config.run.seed,
            step=steps_done,
            stream="eval",
        )

    def evaluate(
        self,
        rollout: RolloutEngine,
        rewards: DistributedRewards,
        steps_done: int,
        endings: Endings,
        stop: Stop | None = None,
    ) -> dict[str, float]:
        """The `evaluation/...` metrics after `steps_done` training steps; a collective.

        Args:
            rollout: the rollout engine, awake and with the current weights; it stays awake.
            rewards: the reward functions; their metrics (timeouts) of this evaluation are read here.
            steps_done: training steps of the current weights.
            endings: which responses are complete.
            stop: ends generation when it returns True.

        Raises:
            RolloutStopped: `stop` returned True; a repeated evaluation with the same weights gives the same metrics.
        """
        groups = rollout.generate(RolloutRequest(self.prompts, self.sampling(steps_done), stop=stop))
        complete = count_as_complete(groups, endings, self.config.rollout.incomplete_responses)
        correct = rewards.score(groups, complete).correct.tolist()
        timeouts = rewards.read_metrics()["reward/timeouts"]
        return summarize(groups, correct) | {"evaluation/timeouts": timeouts}


def load_held_out(
    config: Config, tokenizer: PreTrainedTokenizerBase, columns: Collection[str] = (), needed: Collection[str] = ()
) -> list[Prompt]:
    """The prompts of every evaluation of a run; `config.evaluation` must be set.

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
        raise DataError(f"{HELD_OUT}: {error}") from error
    if settings.prompts is None:
        return list(dataset)
    if settings.prompts > len(dataset):
        raise ConfigError(
            f"evaluation.prompts={settings.prompts}, but the evaluation set has only {len(dataset)} usable prompts: "
            f"lower it to {len(dataset)} or less, or set it to null for all"
        )
    return PromptStream(dataset, SELECTION_SEED).next(settings.prompts)


def summarize(groups: Sequence[ResponseGroup], correct: Sequence[bool]) -> dict[str, float]:
    """Accuracy over problems, and mean length and truncated fraction over responses.

    Args:
        groups: one group of n responses per problem.
        correct: whether each response is correct, in group order.

    Returns:
        `evaluation/pass_at_1`, `evaluation/pass_at_{n}` and `evaluation/maj_at_{n}` (fractions of problems),
        `evaluation/response_length_mean` and `evaluation/truncated_fraction` (truncated fraction) over responses.
    """
    n = len(groups[0].responses)
    rows = [correct[start : start + n] for start in range(0, len(correct), n)]
    finals = [[last_boxed(response.text) for response in group.responses] for group in groups]
    responses = [response for group in groups for response in group.responses]
    return {
        "evaluation/pass_at_1": fmean(map(mean_at_k, rows)),
        f"evaluation/pass_at_{n}": fmean(pass_at_k(row, n) for row in rows),
        f"evaluation/maj_at_{n}": fmean(majority_at_k(a, row, n) for a, row in zip(finals, rows, strict=True)),
        "evaluation/response_length_mean": fmean(len(response.token_ids) for response in responses),
        "evaluation/truncated_fraction": fmean(response.finish_reason == "length" for response in responses),
    }
