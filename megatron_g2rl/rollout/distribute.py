"""Distributes the responses of a step over the replicas of an engine and gathers all groups on every rank."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch.distributed as dist

from megatron_g2rl.distributed.collectives import gather
from megatron_g2rl.records import Response, ResponseGroup
from megatron_g2rl.rollout import exchange
from megatron_g2rl.rollout.engine import (
    RequestedResponses,
    RolloutEngine,
    RolloutRequest,
    RolloutStopped,
    WrappedEngine,
)
from megatron_g2rl.rollout.watch import Watch

_NOTHING = np.empty(0, np.uint8)


@dataclass(frozen=True)
class _Failure:
    """An error on one rank, sent to all ranks so that none waits forever."""

    message: str
    disk: tuple[int | None, str | None, str | None] | None
    """For an OSError: errno, message and file name, so that every rank raises an OSError."""

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        """Wrap `error`."""
        disk = (error.errno, error.strerror, error.filename) if isinstance(error, OSError) else None
        return cls(f"{type(error).__name__}: {error}", disk)


@dataclass(frozen=True)
class _Stopped:
    """This rank was asked to stop before it had generated all of its responses."""


def deal(prompts: int, group_size: int, replicas: int) -> list[dict[int, range]]:
    """Assign responses to replicas: for each replica, ranges of response indices by prompt position, ascending.

    Each replica gets consecutive responses, and the counts differ by at most one. The prompt of a split group is read
    by each of its replicas; no group is split if the groups divide evenly.
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
    """A `RolloutEngine` that combines the engines of all ranks.

    Consecutive ranks that share an engine (tensor parallelism) form one replica. A response's seed depends on its
    prompt and not on its replica, so the number of replicas changes responses only by floating-point noise.
    """

    def __init__(self, engine: RolloutEngine, replica: int, replicas: int, leader: bool) -> None:
        """Wrap this rank's engine; a collective, so torch.distributed must be initialized.

        Args:
            engine: this rank's part of its replica.
            replica: index of this rank's replica, from 0.
            replicas: number of replicas.
            leader: whether this rank reports its replica's responses; exactly one rank per replica does.
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

    def generate(self, request: RolloutRequest) -> list[ResponseGroup]:
        """Generate responses on all ranks together; every rank passes the same prompts and gets all groups.

        `finished` is the same on every rank. It does not change the assignment of responses to replicas: a replica
        generates the remaining ones as in an uninterrupted call. `on_group` receives one replica's part of a group.

        Raises:
            RolloutStopped: `stop` returned True on some rank; raised on every rank.
            OSError: a write in `on_group` failed on some rank; raised on every rank.
            RuntimeError: generation failed on some rank; raised on every rank and names the failed ranks.
            ValueError: `parts` is given; the ranks use it themselves to divide the work.
        """
        if request.parts is not None:
            raise ValueError("an engine that spans all ranks generates complete groups only: pass parts=None")
        dealt = deal(len(request.prompts), request.sampling.group_size, self._replicas)
        watch = Watch(request.stop, self._partners)
        failure: Exception | None = None
        packed = _NOTHING
        contribution: int | _Failure | _Stopped = 0
        try:
            drawn = self._draw(request, dealt[self._replica], watch)
            packed = exchange.pack(drawn) if drawn else _NOTHING
            contribution = len(packed)
        except RolloutStopped:
            contribution = _Stopped()
        except Exception as error:
            failure = error
            contribution = _Failure.of(error)
            watch.request_stop()
        watch.wait_for_others()
        gathered = gather(contribution)
        failures = [(rank, part) for rank, part in enumerate(gathered) if isinstance(part, _Failure)]
        for rank, part in failures:
            if part.disk:
                number, words, file = part.disk
                raise OSError(number, f"{words} (rank {rank})", file) from failure
        if failures:
            reasons = "; ".join(f"rank {rank}: {part.message}" for rank, part in failures)
            raise RuntimeError(f"generation failed on {reasons}") from failure
        if any(isinstance(part, _Stopped) for part in gathered):
            raise RolloutStopped
        requested = RequestedResponses(request)
        gathered_responses: dict[tuple[int, int], Response] = {}
        for rank, responses in exchange.broadcast_all(packed, gathered):
            indices = dealt[rank // self._sharing]
            for position, members in responses.items():
                gathered_responses |= {
                    (position, index): r for index, r in zip(indices[position], members, strict=True)
                }
        return [requested.group(position, gathered_responses) for position in range(len(request.prompts))]

    def _draw(
        self, request: RolloutRequest, assigned: dict[int, range], watch: Watch
    ) -> dict[int, tuple[Response, ...]]:
        """Generate this replica's responses; returns the new ones by position on the leader, {} on other ranks.

        Args:
            request: the request of all replicas.
            assigned: ranges of response indices of this replica (`deal`).
            watch: stops this rank's engine.
        """
        if not assigned:
            return {}
        on_group = request.on_group
        part = replace(
            request,
            prompts=[request.prompts[position] for position in assigned],
            parts=list(assigned.values()),
            on_group=watch.guarded(on_group) if on_group and self._leader else None,
            stop=watch if request.stop or on_group else None,
        )
        requested = RequestedResponses(part)
        try:
            groups = self._engine.generate(part)
        finally:
            watch.raise_error()  # also if the engine stopped because of this error
        if not self._leader:
            return {}
        return {
            position: group.responses
            for i, (position, group) in enumerate(zip(assigned, groups, strict=True))
            if not requested.is_known(i)
        }
