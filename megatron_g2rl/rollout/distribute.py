"""Splits the prompts of a step over the replicas of an engine and brings all groups back to every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from megatron_g2rl.records import Prompt, Response, ResponseGroup
from megatron_g2rl.rollout import exchange
from megatron_g2rl.rollout.engine import OnGroup, RolloutEngine, RolloutStopped, Sampling, Stop, WrappedEngine
from megatron_g2rl.rollout.watch import Watch

_NOTHING = np.empty(0, np.uint8)


@dataclass(frozen=True)
class _Failure:
    """What went wrong on a rank, told to all, so that none waits for ever."""

    message: str
    disk: tuple[int | None, str | None, str | None] | None
    """Of an OSError: number, words and file, so that it is raised as one on every rank."""

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        """The failure that `error` is."""
        disk = (error.errno, error.strerror, error.filename) if isinstance(error, OSError) else None
        return cls(f"{type(error).__name__}: {error}", disk)


@dataclass(frozen=True)
class _Stopped:
    """This rank was asked to stop before it had drawn its share."""


class DistributedRollout(WrappedEngine):
    """A `RolloutEngine` made of one engine on every rank.

    Consecutive ranks may share an engine (tensor parallelism) and are then one replica. A response's seed depends on
    its prompt and not on its replica, so the number of replicas changes no response beyond float noise.
    """

    def __init__(self, engine: RolloutEngine, replica: int, replicas: int, leader: bool) -> None:
        """Wrap this rank's engine; torch.distributed must be initialised, and every rank does this at the same time.

        Args:
            engine: this rank's part of its replica.
            replica: which replica this rank belongs to, from 0.
            replicas: number of replicas.
            leader: whether this rank speaks for its replica: exactly one does.
        """
        super().__init__(engine)
        self._replica = replica
        self._replicas = replicas
        self._leader = leader
        self._partners: dist.ProcessGroup | None = None
        sharing = dist.get_world_size() // replicas
        if sharing > 1:
            members = [list(range(start, start + sharing)) for start in range(0, dist.get_world_size(), sharing)]
            self._partners, _ = dist.new_subgroups_by_enumeration(members, backend="gloo")

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        finished: Mapping[int, tuple[Response, ...]] | None = None,
        on_group: OnGroup | None = None,
        stop: Stop | None = None,
    ) -> list[ResponseGroup]:
        """Draw responses to all prompts together; every rank passes all prompts and gets all groups, in order.

        `finished` is the same on every rank. It does not change which replica a prompt belongs to, so that a replica
        draws what is left as it would have done with the rest.

        Raises:
            RolloutStopped: `stop` said so on some rank; raised on every rank.
            OSError: `on_group` could not write on some rank; raised on every rank.
            RuntimeError: sampling failed on some rank; raised on every rank and names the failed ones.
        """
        finished = finished or {}
        watch = Watch(stop, self._partners)
        failure: Exception | None = None
        own = _NOTHING
        contribution: int | _Failure | _Stopped = 0
        try:
            drawn = self._share(prompts, sampling, finished, on_group, stop, watch)
            own = exchange.pack(drawn) if drawn else _NOTHING
            contribution = len(own)
        except RolloutStopped:
            contribution = _Stopped()
        except Exception as error:
            failure = error
            contribution = _Failure.of(error)
            watch.tell_others()
        watch.wait_for_others()
        gathered: list[int | _Failure | _Stopped] = [0] * dist.get_world_size()
        dist.all_gather_object(gathered, contribution)
        failures = [(rank, part) for rank, part in enumerate(gathered) if isinstance(part, _Failure)]
        for rank, part in failures:
            if part.disk:
                number, words, file = part.disk
                raise OSError(number, f"{words} (rank {rank})", file) from failure
        if failures:
            told = "; ".join(f"rank {rank}: {part.message}" for rank, part in failures)
            raise RuntimeError(f"sampling failed on {told}") from failure
        if any(isinstance(part, _Stopped) for part in gathered):
            raise RolloutStopped
        responses = exchange.share(own, gathered)
        return [
            ResponseGroup(prompt, responses[position] if position in responses else finished[prompt.id])
            for position, prompt in enumerate(prompts)
        ]

    def _share(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        finished: Mapping[int, tuple[Response, ...]],
        on_group: OnGroup | None,
        stop: Stop | None,
        watch: Watch,
    ) -> dict[int, tuple[Response, ...]]:
        """What this rank tells the others: the new responses of its replica, by position, if it leads it."""
        own = range(self._replica, len(prompts), self._replicas)
        if not own:
            return {}
        groups = self._engine.generate(
            [prompts[position] for position in own],
            sampling,
            finished=finished,
            on_group=watch.guarded(on_group) if on_group and self._leader else None,
            stop=watch if stop or on_group else None,
        )
        watch.raise_error()
        if not self._leader:
            return {}
        return {
            position: group.responses
            for position, group in zip(own, groups, strict=True)
            if group.prompt.id not in finished
        }
