"""Deals the responses of a step to the replicas of an engine and brings all groups back to every rank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from megatron_g2rl.records import Prompt, Response, ResponseGroup
from megatron_g2rl.rollout import exchange
from megatron_g2rl.rollout.engine import (
    Finished,
    OnGroup,
    RolloutEngine,
    RolloutStopped,
    Sampling,
    Stop,
    WantedResponses,
    WrappedEngine,
)
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


def deal(prompts: int, group_size: int, replicas: int) -> list[dict[int, range]]:
    """Which responses each replica draws: indices by the position of their prompt, which ascend.

    Each gets consecutive responses, and no replica more than one more than another. A group that is split is read by
    each of its replicas; none is where the groups can be dealt evenly.
    """
    total = prompts * group_size
    bounds = [total * replica // replicas for replica in range(replicas + 1)]
    return [
        {
            position: range(max(begin - position * group_size, 0), min(end - position * group_size, group_size))
            for position in range(begin // group_size, -(-end // group_size))
        }
        if begin < end
        else {}
        for begin, end in itertools.pairwise(bounds)
    ]


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
        self._sharing = dist.get_world_size() // replicas
        if self._sharing > 1:
            starts = range(0, dist.get_world_size(), self._sharing)
            members = [list(range(start, start + self._sharing)) for start in starts]
            self._partners, _ = dist.new_subgroups_by_enumeration(members, backend="gloo")

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        finished: Finished | None = None,
        parts: Sequence[range] | None = None,
        on_group: OnGroup | None = None,
        stop: Stop | None = None,
    ) -> list[ResponseGroup]:
        """Draw responses to all prompts together; every rank passes all prompts and gets all groups, in order.

        `finished` is the same on every rank. It does not change which replica a response belongs to, so that a replica
        draws what is left as it would have done with the rest. `on_group` is handed what one replica draws of a group.

        Raises:
            RolloutStopped: `stop` said so on some rank; raised on every rank.
            OSError: `on_group` could not write on some rank; raised on every rank.
            RuntimeError: sampling failed on some rank; raised on every rank and names the failed ones.
            ValueError: `parts` are asked for, which are how the ranks divide the work.
        """
        if parts is not None:
            raise ValueError("an engine over all ranks draws complete groups")
        finished = finished or {}
        dealt = deal(len(prompts), sampling.group_size, self._replicas)
        watch = Watch(stop, self._partners)
        failure: Exception | None = None
        own = _NOTHING
        contribution: int | _Failure | _Stopped = 0
        try:
            drawn = self._draw(prompts, dealt[self._replica], sampling, finished, on_group, stop, watch)
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
        wanted, found = WantedResponses(prompts, sampling, finished, None), {}
        for rank, responses in exchange.share(own, gathered):
            indices = dealt[rank // self._sharing]
            for position, members in responses.items():
                found |= {(position, index): r for index, r in zip(indices[position], members, strict=True)}
        return [wanted.group(position, found) for position in range(len(prompts))]

    def _draw(
        self,
        prompts: Sequence[Prompt],
        own: dict[int, range],
        sampling: Sampling,
        finished: Finished,
        on_group: OnGroup | None,
        stop: Stop | None,
        watch: Watch,
    ) -> dict[int, tuple[Response, ...]]:
        """What this rank sends the others: what its replica drew, by position, if it leads it.

        Args:
            own: what the replica draws (`deal`).
        """
        if not own:
            return {}
        asked, parts = [prompts[position] for position in own], list(own.values())
        wanted = WantedResponses(asked, sampling, finished, parts)
        try:
            groups = self._engine.generate(
                asked,
                sampling,
                finished=finished,
                parts=parts,
                on_group=watch.guarded(on_group) if on_group and self._leader else None,
                stop=watch if stop or on_group else None,
            )
        finally:
            watch.raise_error()  # also where the engine has stopped because of it
        if not self._leader:
            return {}
        return {
            position: group.responses
            for place, (position, group) in enumerate(zip(own, groups, strict=True))
            if not wanted.is_known(place)
        }
