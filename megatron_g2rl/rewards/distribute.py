"""Judges the responses of a step on all ranks: each rank's pool takes its part, and every rank gets all verdicts."""

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

from megatron_g2rl.config.tree import RewardConfig, RewardFunctionConfig
from megatron_g2rl.errors import UserError
from megatron_g2rl.records import Prompt, ResponseGroup
from megatron_g2rl.rewards.binding import Sample
from megatron_g2rl.rewards.pool import RewardPool
from megatron_g2rl.rewards.results import FAILED_REWARD, FunctionSpec, RewardError, RewardResult

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judged:
    """What the reward functions say of R responses."""

    rewards: Float[Tensor, "responses"]
    """float32: the reward of one function, in [-1, 1], or the weighted sum of several."""
    correct: Bool[Tensor, "responses"]
    parts: dict[str, Float[Tensor, "responses"]]
    """Of several functions, by name: their rewards before they are weighted; NaN where a function failed."""


class DistributedRewards:
    """One `RewardPool` a rank."""

    def __init__(self, config: RewardConfig):
        """Start this rank's workers.

        Raises:
            RewardError: a reward function cannot be loaded.
        """
        most = max(8, 4 * (os.cpu_count() or 1))
        if config.workers > most and dist.get_rank() == 0:
            log.warning(
                "reward.workers=%d is more than this machine can use (four for each core): %d", config.workers, most
            )
        self._config = config
        self._functions = config.each_function()
        specs = [
            FunctionSpec(part.function, part.arguments, part.deadline_s, part.batch_size, bounded=not config.functions)
            for part in self._functions
        ]
        self._pool = RewardPool(specs, min(config.workers, most), config.deadline_s, config.key)
        self._counts: dict[str, list[float]] = {}
        self._warned_of_scale = False

    @property
    def possible_columns(self) -> set[str]:
        """Columns of the data that the functions may take; `binding.ALL_COLUMNS` for all of them."""
        return self._pool.possible_columns

    def bind(self, columns: Collection[str]) -> set[str]:
        """Decide what each parameter gets, given the columns of the data; the columns that are needed.

        Raises:
            RewardError: a parameter is neither known nor a column.
        """
        return self._pool.bind(columns)

    def judge(self, groups: Sequence[ResponseGroup], complete: Sequence[bool]) -> Judged:
        """Verdicts on all responses, group after group; a collective.

        Args:
            groups: prompts and responses, the same on every rank.
            complete: whether each response can be correct (`rollout.endings.count_as_complete`).

        Raises:
            RewardError: a reward function failed on some rank; raised on every rank.
        """
        responses = [(group.prompt, response) for group in groups for response in group.responses]
        samples = [
            Sample(r.text, p.answer, p.text, r.token_ids, r.finish_reason, p.columns, whole)
            for (p, r), whole in zip(responses, complete, strict=True)
        ]
        results = self._judge_everywhere(samples)
        for result in results:
            for name, value in result.metrics().items():
                self._counts.setdefault(name, []).append(value)
        judged = combine(results, self._config, complete)
        self._warn_of_scale(judged.rewards)
        return judged

    def _judge_everywhere(self, samples: Sequence[Sample]) -> list[RewardResult]:
        """One result for each function, of all ranks' parts."""
        rank, world = dist.get_rank(), dist.get_world_size()
        results, failure = [], None
        try:
            results = self._pool.judge_all(samples[rank::world])
        except Exception as error:  # whatever it is, the other ranks must hear of it
            failure = error
        gathered: list = [None] * world
        detail = f"{failure}" if isinstance(failure, UserError) else f"{type(failure).__name__}: {failure}"
        dist.all_gather_object(gathered, detail if failure else results)
        failures = [f"rank {i}: {part}" for i, part in enumerate(gathered) if isinstance(part, str)]
        if failures:
            raise RewardError("\n".join(failures)) from failure
        return [RewardResult.interleaved(parts) for parts in zip(*gathered, strict=True)]

    def smoke_test(self, prompt: Prompt, encode: Callable[[str], Sequence[int]]) -> None:
        """Judge an empty, truncated response and a right-looking one to a problem, and log the verdicts; a collective.

        Args:
            prompt: the problem.
            encode: makes the token ids of a text.

        Raises:
            RewardError: a reward function fails for one of them, as it would after the first rollout: it raises,
                returns no reward, ends its process or runs past its deadline.
        """
        text = f"\\boxed{{{prompt.answer}}}"
        empty = Sample("", prompt.answer, prompt.text, (), "length", prompt.columns)
        samples = [empty, Sample(text, prompt.answer, prompt.text, tuple(encode(text)), "stop", prompt.columns)]
        results = self._judge_everywhere(samples)
        for part, result in zip(self._functions, results, strict=True):
            for i, sample in enumerate(samples):
                if result.timed_out[i] or result.died[i]:
                    raise RewardError(self._trial_failure(part, sample, result.timed_out[i]))
            if dist.get_rank() == 0:
                verdicts = [
                    f"{shown}: reward {reward:g}, {'correct' if _is_correct(said, reward, self._config) else 'wrong'}"
                    for shown, reward, said in zip(
                        ("an empty response", f"{text[:100]!r}"), result.rewards, result.correct, strict=True
                    )
                ]
                seconds = max(result.answer_seconds)
                log.info("trial of %s (%.2g s): %s", part.function, seconds, "; ".join(verdicts))

    def _trial_failure(self, part: RewardFunctionConfig, sample: Sample, timed_out: bool) -> str:
        what = "ended its process, or ran out of memory,"
        remedy = "correct it"
        if timed_out:
            what = f"ran past reward.deadline_s ({part.deadline_s:g} s)"
            remedy = "correct it, or raise reward.deadline_s if it needs longer"
        return (
            f"{self._config.key}: {part.function} {what} in its trial on the first problem, for the response "
            f"{sample.response[:100]!r}. Such responses would count as wrong: {remedy}"
        )

    def _warn_of_scale(self, rewards: Float[Tensor, "responses"]) -> None:
        if self._warned_of_scale or not len(rewards) or dist.get_rank():
            return
        if float(rewards.abs().max()) > 1 + 1e-6:
            self._warned_of_scale = True
            log.warning(
                "the weighted sum of reward.functions is %.3g for some response: shaping (exploration.strength, "
                "exploration.reward_clip) is made for rewards in [-1, 1]; smaller weights keep them there",
                float(rewards[rewards.abs().argmax()]),
            )

    def read_metrics(self) -> dict[str, float]:
        """`reward/timeouts` and `reward/worker_crashes` over all ranks, and the slowest answer, since the last call."""
        counts, self._counts = self._counts, {}
        return {
            "reward/timeouts": float(sum(counts.get("timeouts", []))),
            "reward/worker_crashes": float(sum(counts.get("deaths", []))),
            "reward/latency_s_max": max(counts.get("answer_seconds_max", [0.0])),
        }

    def close(self) -> None:
        """End this rank's workers."""
        self._pool.close()


def combine(results: Sequence[RewardResult], config: RewardConfig, complete: Sequence[bool]) -> Judged:
    """Rewards and correctness of responses, from what each function says of them.

    A function that failed for a response (a time-out, a crash) lowers its reward by the absolute value of its weight.

    Args:
        results: one for each of `config.each_function()`.
        config: weights, and which function decides correctness.
        complete: whether each response can be correct.
    """
    functions = config.each_function()
    decider = results[config.decides_correctness]
    correct = [
        whole and not (late or dead) and _is_correct(said, reward, config)
        for whole, late, dead, said, reward in zip(
            complete, decider.timed_out, decider.died, decider.correct, decider.rewards, strict=True
        )
    ]
    if not config.functions:
        return Judged(torch.tensor(decider.rewards), torch.tensor(correct, dtype=torch.bool), {})
    total, parts = torch.zeros(len(complete), dtype=torch.float64), {}
    for part, result in zip(functions, results, strict=True):
        failed = torch.tensor(
            [late or dead for late, dead in zip(result.timed_out, result.died, strict=True)], dtype=torch.bool
        )
        values = torch.tensor(result.rewards, dtype=torch.float64)
        total += torch.where(failed, FAILED_REWARD * abs(part.weight), part.weight * values)
        parts[part.label] = torch.where(failed, math.nan, values).float()
    return Judged(total.float(), torch.tensor(correct, dtype=torch.bool), parts)


def _is_correct(said: bool | None, reward: float, config: RewardConfig) -> bool:
    """What the function says, or else whether its reward is high enough."""
    return reward > config.correct_above if said is None else said
