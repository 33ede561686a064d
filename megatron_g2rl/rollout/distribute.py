"""Splits the prompts of a step over the replicas of an engine and brings all groups back to every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_g2rl.records import Prompt, Response, ResponseGroup
from megatron_g2rl.rollout.engine import RolloutEngine, Sampling


@dataclass(frozen=True)
class _Failure:
    """What went wrong on a rank, told to all, so that none waits for ever."""

    message: str


class DistributedRollout:
    """A `RolloutEngine` made of one engine on every rank.

    Consecutive ranks may share an engine (tensor parallelism) and are then one replica. A response's seed depends on
    its prompt and not on its replica, so the number of replicas changes no response beyond float noise.
    """

    def __init__(self, engine: RolloutEngine, replica: int, replicas: int, leader: bool) -> None:
        """Wrap this rank's engine; torch.distributed must be initialised.

        Args:
            engine: this rank's part of its replica.
            replica: which replica this rank belongs to, from 0.
            replicas: number of replicas.
            leader: whether this rank speaks for its replica: exactly one does.
        """
        self._engine = engine
        self._replica = replica
        self._replicas = replicas
        self._leader = leader

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[ResponseGroup]:
        """Draw responses to all prompts together; every rank passes all prompts and gets all groups, in order.

        Raises:
            RuntimeError: sampling failed on some rank; raised on every rank and names the failed ones.
        """
        own = range(self._replica, len(prompts), self._replicas)
        failure: Exception | None = None
        contribution: dict[int, tuple[Response, ...]] | _Failure = {}
        try:
            groups = self._engine.generate([prompts[position] for position in own], sampling) if own else []
            if self._leader:
                contribution = {position: group.responses for position, group in zip(own, groups, strict=True)}
        except Exception as error:
            failure = error
            contribution = _Failure(f"{type(error).__name__}: {error}")
        gathered: list[dict[int, tuple[Response, ...]] | _Failure] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, contribution)
        failures = [f"rank {rank}: {part.message}" for rank, part in enumerate(gathered) if isinstance(part, _Failure)]
        if failures:
            raise RuntimeError("sampling failed on " + "; ".join(failures)) from failure
        responses = {position: drawn for part in gathered for position, drawn in part.items()}
        return [ResponseGroup(prompt, responses[position]) for position, prompt in enumerate(prompts)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Give this rank's engine new weights; every rank streams all of them."""
        self._engine.load_weights(weights)

    def sleep(self) -> None:
        """Put this rank's engine to sleep."""
        self._engine.sleep()

    def wake(self) -> None:
        """Wake this rank's engine."""
        self._engine.wake()

    def close(self) -> None:
        """Close this rank's engine."""
        self._engine.close()
