"""Input and output types of the reward pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_g2rl.errors import UserError

CHUNK = 16
"""Maximum responses per message to a worker: large enough to amortize messages, small enough to balance load."""
FAILED_REWARD = -1.0
"""Reward of a response whose worker was killed at the deadline or died."""


class RewardError(UserError):
    """The reward function cannot be loaded, raised an exception, or returned an invalid reward."""


@dataclass(frozen=True)
class FunctionSpec:
    """A reward function as specified in the configuration."""

    function: str
    """`package.module:name` of a function or a class."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function, or of the class's constructor."""
    deadline_s: float | None = None
    """Wall-clock seconds per call; None: the pool's deadline."""
    batch_size: int = CHUNK
    """Maximum responses per call if the function takes a batch or is async."""
    bounded: bool = True
    """Whether its rewards must be in [-1, 1]."""


@dataclass(frozen=True)
class RewardResult:
    """Results of one function for a batch of responses; every list is in the order of the items."""

    rewards: list[float]
    """Reward of each response; `FAILED_REWARD` if it timed out or its worker died."""
    correct: list[bool | None]
    """Whether each response is correct; None if the function does not return it; False if the function failed."""
    forms: list[str | None]
    """Canonical form of each response; None if the function does not return one or failed, "" if it returns None."""
    timed_out: list[bool]
    """Whether the worker was killed at the deadline."""
    died: list[bool]
    """Whether the worker died (a crash, an exit, the memory limit)."""
    answer_seconds: list[float]
    """Wall-clock seconds of each response in its worker."""
    seconds: float
    """Wall-clock seconds of the batch."""

    @classmethod
    def interleaved(cls, parts: Sequence[RewardResult]) -> RewardResult:
        """Merge n parts, of which part i holds every n-th item, starting with item i."""
        count = sum(len(part.rewards) for part in parts)

        def joined(name: str) -> list:
            values = [None] * count
            for offset, part in enumerate(parts):
                values[offset :: len(parts)] = getattr(part, name)
            return values

        names = ("rewards", "correct", "forms", "timed_out", "died", "answer_seconds")
        return cls(*map(joined, names), seconds=max(part.seconds for part in parts))

    def metrics(self) -> dict[str, float]:
        """Counts of timeouts and worker deaths, seconds of the batch, and seconds per response (max and mean)."""
        return {
            "timeouts": sum(self.timed_out),
            "deaths": sum(self.died),
            "seconds": self.seconds,
            "answer_seconds_max": max(self.answer_seconds, default=0.0),
            "answer_seconds_mean": sum(self.answer_seconds) / max(len(self.answer_seconds), 1),
        }
