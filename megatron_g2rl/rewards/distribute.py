"""Judges the responses of a step on all ranks: each rank's pool takes its share, and every rank gets all rewards."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from megatron_g2rl.config.tree import RewardConfig
from megatron_g2rl.errors import UserError
from megatron_g2rl.rewards.pool import RewardError, RewardPool

log = logging.getLogger(__name__)


class DistributedRewards:
    """One `RewardPool` a rank."""

    def __init__(self, config: RewardConfig):
        """Start this rank's workers.

        Raises:
            RewardError: the reward function cannot be loaded.
        """
        most = max(8, 4 * (os.cpu_count() or 1))
        if config.workers > most and dist.get_rank() == 0:
            log.warning(
                "reward.workers=%d is more than this machine can use (four for each core): %d", config.workers, most
            )
        self._pool = RewardPool(config.function, min(config.workers, most), config.deadline_s)
        self._counts: dict[str, list[float]] = {}

    def judge(self, texts: Sequence[str], answers: Sequence[str]) -> Float[Tensor, "responses"]:
        """Rewards of all responses, in their order (float32, [-1, 1]); a collective.

        Args:
            texts: every response, the same list on every rank.
            answers: reference answer of each.

        Raises:
            RewardError: the reward function failed on some rank; raised on every rank.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        result, failure = None, None
        try:
            result = self._pool.judge(list(zip(texts, answers, strict=True))[rank::world])
        except Exception as error:  # whatever it is, the other ranks must hear of it
            failure = error
        gathered: list = [None] * world
        told = f"{failure}" if isinstance(failure, UserError) else f"{type(failure).__name__}: {failure}"
        mine = told if failure else (result.rewards, result.metrics())
        dist.all_gather_object(gathered, mine)
        failures = [f"rank {i}: {part}" for i, part in enumerate(gathered) if isinstance(part, str)]
        if failures:
            raise RewardError("\n".join(failures)) from failure
        rewards = torch.empty(len(texts))
        for i, (values, metrics) in enumerate(gathered):
            rewards[i::world] = torch.tensor(values)
            for name, value in metrics.items():
                self._counts.setdefault(name, []).append(value)
        return rewards

    def try_on(self, answer: str) -> None:
        """Judge an empty and a right-looking response to a problem with `answer`, and forget the rewards; a collective.

        Raises:
            RewardError: the reward function fails for one of them, as it would after the first rollout.
        """
        self.judge(["", f"\\boxed{{{answer}}}"], [answer, answer])
        self._counts = {}

    def read_metrics(self) -> dict[str, float]:
        """`reward/timeouts` and `reward/deaths` over all ranks, and the slowest answer, since the last call."""
        counts, self._counts = self._counts, {}
        return {
            "reward/timeouts": float(sum(counts.get("timeouts", []))),
            "reward/deaths": float(sum(counts.get("deaths", []))),
            "reward/answer_s_max": max(counts.get("answer_seconds_max", [0.0])),
        }

    def close(self) -> None:
        """End this rank's workers."""
        self._pool.close()
