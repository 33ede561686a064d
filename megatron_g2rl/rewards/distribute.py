"""Scores the responses of a step on all ranks: each rank's pool scores its part, and every rank gets all results."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_g2rl.config.sections.rewards import RewardConfig, RewardFunctionConfig
from megatron_g2rl.distributed.collectives import gather
from megatron_g2rl.errors import UserError
from megatron_g2rl.records import Prompt, ResponseGroup
from megatron_g2rl.rewards.binding import Sample
from megatron_g2rl.rewards.pool import RewardPool
from megatron_g2rl.rewards.results import FAILED_REWARD, FunctionSpec, RewardError, RewardResult

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoredRewards:
    """Results of the reward functions for R responses."""

    rewards: Float[Tensor, "responses"]
    """float32: the reward of a single function, in [-1, 1], or the weighted sum of several."""
    correct: Bool[Tensor, "responses"]
    parts: dict[str, Float[Tensor, "responses"]]
    """With several functions: unweighted rewards by function name; NaN where a function failed."""
    forms: tuple[str | None, ...] | None = None
    """Canonical form of each response, by the function that decides whether it is correct; "" for responses without a
    form or not correct, and None where the function returns no forms. None: it returns none for any response."""


class DistributedRewards:
    """One `RewardPool` per rank."""

    def __init__(self, config: RewardConfig):
        """Start this rank's workers.

        Raises:
            RewardError: a reward function cannot be loaded.
        """
        limit = max(8, 4 * (os.cpu_count() or 1))
        if config.workers > limit and dist.get_rank() == 0:
            log.warning("reward.workers=%d exceeds four per core of this machine: using %d", config.workers, limit)
        self._config = config
        self._functions = config.each_function()
        specs = [
            FunctionSpec(part.function, part.arguments, part.deadline_s, part.batch_size, bounded=not config.functions)
            for part in self._functions
        ]
        self._pool = RewardPool(specs, min(config.workers, limit), config.deadline_s, config.key)
        self._counts: dict[str, list[float]] = {}
        self._warned_of_scale = False

    @property
    def possible_columns(self) -> set[str]:
        """Columns of the data that the functions may take; `binding.ALL_COLUMNS` for all of them."""
        return self._pool.possible_columns

    def bind(self, columns: Collection[str]) -> set[str]:
        """Bind each parameter, given the columns of the data; returns the required columns.

        Raises:
            RewardError: a required parameter is neither a known name nor a column.
        """
        return self._pool.bind(columns)

    def score(self, groups: Sequence[ResponseGroup], complete: Sequence[bool]) -> ScoredRewards:
        """Score all responses, in group order; a collective.

        Args:
            groups: prompts and responses, identical on every rank.
            complete: whether each response counts as complete (`rollout.endings.count_as_complete`).

        Raises:
            RewardError: a reward function failed on some rank; raised on every rank.
        """
        responses = [(group.prompt, response) for group in groups for response in group.responses]
        samples = [
            Sample(r.text, p.answer, p.text, r.token_ids, r.finish_reason, p.columns, is_complete)
            for (p, r), is_complete in zip(responses, complete, strict=True)
        ]
        results = self._score_everywhere(samples)
        for result in results:
            for name, value in result.metrics().items():
                self._counts.setdefault(name, []).append(value)
        scored = combine(results, self._config, complete)
        self._warn_of_scale(scored.rewards)
        return scored

    def _score_everywhere(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result per function, merged over all ranks."""
        rank, world = dist.get_rank(), dist.get_world_size()
        results, failure = [], None
        try:
            results = self._pool.score_all(samples[rank::world])
        except Exception as error:  # any error must reach the other ranks
            failure = error
        detail = f"{failure}" if isinstance(failure, UserError) else f"{type(failure).__name__}: {failure}"
        gathered = gather(detail if failure else results)
        failures = [f"rank {i}: {part}" for i, part in enumerate(gathered) if isinstance(part, str)]
        if failures:
            raise RewardError("\n".join(failures)) from failure
        return [RewardResult.interleaved(parts) for parts in zip(*gathered, strict=True)]

    def smoke_test(self, prompt: Prompt, encode: Callable[[str], Sequence[int]]) -> None:
        """Score an empty, truncated response and one with the reference answer, and log the results; a collective.

        Args:
            prompt: the prompt to test with.
            encode: encodes a text to token ids.

        Raises:
            RewardError: a reward function fails for one of them, as it would after the first rollout: it raises,
                returns an invalid reward, exits its process or exceeds its deadline.
        """
        text = f"\\boxed{{{prompt.answer}}}"
        empty = Sample("", prompt.answer, prompt.text, (), "length", prompt.columns)
        samples = [empty, Sample(text, prompt.answer, prompt.text, tuple(encode(text)), "stop", prompt.columns)]
        results = self._score_everywhere(samples)
        for part, result in zip(self._functions, results, strict=True):
            for i, sample in enumerate(samples):
                if result.timed_out[i] or result.died[i]:
                    raise RewardError(self._smoke_test_failure(part, sample, result.timed_out[i]))
            if dist.get_rank() == 0:
                outcomes = [
                    f"{shown}: reward {reward:g}, {'' if _is_correct(flag, reward, self._config) else 'in'}correct"
                    for shown, reward, flag in zip(
                        ("an empty response", f"{text[:100]!r}"), result.rewards, result.correct, strict=True
                    )
                ]
                seconds = max(result.answer_seconds)
                log.info("smoke test of %s (%.2g s): %s", part.function, seconds, "; ".join(outcomes))

    def _smoke_test_failure(self, part: RewardFunctionConfig, sample: Sample, timed_out: bool) -> str:
        what = "exited its process, or ran out of memory,"
        remedy = "fix it"
        if timed_out:
            what = f"exceeded reward.deadline_s ({part.deadline_s:g} s)"
            remedy = "fix it, or raise reward.deadline_s if it needs more time"
        return (
            f"{self._config.key}: {part.function} {what} in its smoke test on the first prompt, for the response "
            f"{sample.response[:100]!r}. Such responses would count as incorrect: {remedy}"
        )

    def _warn_of_scale(self, rewards: Float[Tensor, "responses"]) -> None:
        if self._warned_of_scale or not len(rewards) or dist.get_rank():
            return
        if float(rewards.abs().max()) > 1 + 1e-6:
            self._warned_of_scale = True
            log.warning(
                "the weighted sum of reward.functions is %.3g for a response, but shaping (exploration.strength, "
                "exploration.reward_clip) expects rewards in [-1, 1]; use smaller weights",
                float(rewards[rewards.abs().argmax()]),
            )

    def read_metrics(self) -> dict[str, float]:
        """`reward/timeouts` and `reward/worker_crashes` over all ranks, and the slowest call, since the last read."""
        counts, self._counts = self._counts, {}
        return {
            "reward/timeouts": float(sum(counts.get("timeouts", []))),
            "reward/worker_crashes": float(sum(counts.get("deaths", []))),
            "reward/latency_s_max": max(counts.get("answer_seconds_max", [0.0])),
        }

    def close(self) -> None:
        """Stop this rank's workers."""
        self._pool.close()


def combine(results: Sequence[RewardResult], config: RewardConfig, complete: Sequence[bool]) -> ScoredRewards:
    """Combine the results of all functions to rewards and correctness.

    A function that failed for a response (timeout or crash) lowers its reward by the absolute value of its weight.

    Args:
        results: one per entry of `config.each_function()`.
        config: weights, and which function decides correctness.
        complete: whether each response counts as complete; others are never correct.
    """
    functions = config.each_function()
    decider = results[config.decides_correctness]
    correct = [
        is_complete and not (late or dead) and _is_correct(flag, reward, config)
        for is_complete, late, dead, flag, reward in zip(
            complete, decider.timed_out, decider.died, decider.correct, decider.rewards, strict=True
        )
    ]
    forms = tuple(
        form if is_correct or form is None else "" for form, is_correct in zip(decider.forms, correct, strict=True)
    )
    forms = forms if any(form is not None for form in forms) else None
    if not config.functions:
        return ScoredRewards(torch.tensor(decider.rewards), torch.tensor(correct, dtype=torch.bool), {}, forms)
    total, parts = torch.zeros(len(complete), dtype=torch.float64), {}
    for part, result in zip(functions, results, strict=True):
        failed = torch.tensor(
            [late or dead for late, dead in zip(result.timed_out, result.died, strict=True)], dtype=torch.bool
        )
        values = torch.tensor(result.rewards, dtype=torch.float64)
        total += torch.where(failed, FAILED_REWARD * abs(part.weight), part.weight * values)
        parts[part.label] = torch.where(failed, math.nan, values).float()
    return ScoredRewards(total.float(), torch.tensor(correct, dtype=torch.bool), parts, forms)


def _is_correct(flag: bool | None, reward: float, config: RewardConfig) -> bool:
    """The function's own flag, or else whether its reward is above `correct_above`."""
    return reward > config.correct_above if flag is None else flag
