"""Lanes: rows of jobs in Slurm's queue, each waiting for the one before, so that Slurm keeps a limit by itself."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

FORMAT = "%A|%j|%T|%E"
"""Of squeue, as `queued_jobs` reads it."""


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue."""

    number: str
    """Its id."""
    name: str
    """Its name, the run's."""
    state: str
    """Slurm's word."""
    after: frozenset[str]
    """Jobs that it still waits for."""


class Lanes:
    """Rows of jobs, of which only the first is ever under way."""

    def __init__(self, concurrency: int, under_way: Sequence[tuple[str, ...]], queue: Mapping[str, QueuedJob]):
        """Find the lanes in the queue; more than `concurrency` of them, from a higher limit before, are joined.

        Args:
            concurrency: number of lanes.
            under_way: ids of the jobs of each run in the queue.
            queue: those jobs by id.
        """
        depends = {jobs: {other for job in jobs for other in queue[job].after} for jobs in under_way}
        last = [jobs for jobs in under_way if not any(depends[other] & {*jobs} for other in under_way if other != jobs)]
        self._lanes: list[tuple[int, list[str]]] = [(0, []) for _ in range(concurrency)]
        for number, jobs in enumerate(last):
            length, tail = self._lanes[number % concurrency]
            self._lanes[number % concurrency] = (length + _length(jobs, under_way, depends), [*tail, *jobs])

    def next(self) -> list[str]:
        """Jobs that the next run has to wait for."""
        return self._shortest()[1]

    def add(self, jobs: Iterable[str]) -> None:
        """Put the next run's jobs behind those."""
        shortest = self._shortest()
        self._lanes[self._lanes.index(shortest)] = (shortest[0] + 1, list(jobs))

    def _shortest(self) -> tuple[int, list[str]]:
        return min(self._lanes, key=lambda lane: lane[0])


def _length(jobs: tuple[str, ...], under_way: Sequence[tuple[str, ...]], depends: Mapping) -> int:
    return 1 + sum(_length(other, under_way, depends) for other in under_way if depends[jobs] & {*other})


def queued_jobs(text: str) -> dict[str, QueuedJob]:
    """What squeue said, by job id; a dependency that is met is no longer in it."""
    cells = [line.split("|", 3) for line in text.splitlines() if line.count("|") >= 3]
    return {cell[0]: QueuedJob(*cell[:3], frozenset(re.findall(r"afterany:(\d+)", cell[3]))) for cell in cells}
