"""Partitions the responses of each group by their final answers, for the exploration method `partition`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from megatron_g2rl.distributed.collectives import on_all_ranks
from megatron_g2rl.records import ResponseGroup
from megatron_g2rl.rewards.boxed import last_boxed
from megatron_g2rl.rewards.pool import RewardPool
from megatron_g2rl.rewards.verifier import MATH_REWARD

MOST_DISTINCT = 64
"""Maximum distinct answers of a group that are compared; each further one is a separate class, to limit the pairs."""


class AnswerClasses:
    """Compares answers in worker processes with a time limit, as rewards are; a pool per rank."""

    def __init__(self, workers: int, deadline_s: float):
        """Start this rank's workers.

        Args:
            workers: number of processes.
            deadline_s: seconds per comparison; answers that take longer are in different classes.
        """
        self._pool = RewardPool(MATH_REWARD, workers, deadline_s, "exploration.method=partition")

    def of(self, groups: Sequence[ResponseGroup]) -> Int[Tensor, "responses"]:
        """Number of the class of each response, unique within its group; a collective.

        Responses whose final answers are equal by the verifier are one class, and so are those without an answer.

        Args:
            groups: prompts and responses, identical on every rank.
        """
        answers = [[last_boxed(response.text) for response in group.responses] for group in groups]
        distinct = [list(dict.fromkeys(answer for answer in each if answer is not None)) for each in answers]
        pairs = [
            (group, first, second)
            for group, texts in enumerate(distinct)
            for first, second in combinations(texts[:MOST_DISTINCT], 2)
        ]
        equal = self._equal([(first, second) for _, first, second in pairs])
        # The class of a text is the first one that equals it.
        first_equal = [{text: text for text in texts} for texts in distinct]
        for (group, first, second), same in zip(pairs, equal, strict=True):
            representative = first_equal[group]
            if same and representative[second] == second:
                representative[second] = representative[first]
        numbers = []
        for each, representative in zip(answers, first_equal, strict=True):
            classes = {text: number for number, text in enumerate(dict.fromkeys(representative.values()), 1)}
            numbers += [0 if answer is None else classes[representative[answer]] for answer in each]
        return torch.tensor(numbers, dtype=torch.long)

    def _equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        rank, world = dist.get_rank(), dist.get_world_size()
        own = [(f"\\boxed{{{found}}}", reference) for reference, found in pairs[rank::world]]
        equal = [False] * len(pairs)
        for place, rewards in enumerate(on_all_ranks(lambda: self._pool.score(own).rewards if own else [])):
            equal[place::world] = [reward > 0 for reward in rewards]
        return equal

    def close(self) -> None:
        """Stop this rank's workers."""
        self._pool.close()
