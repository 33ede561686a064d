"""What the reward pool is given and gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_g2rl.errors import UserError

CHUNK = 16
"""Most answers handed to a worker at a time: enough that messages cost nothing, few enough to share work out."""
FAILED_REWARD = -1.0
"""Reward of an answer whose worker was killed at the deadline or died."""


class RewardError(UserError):
    """The reward function cannot be loaded, raised an exception, or returned no number in [-1, 1]."""


@dataclass(frozen=True)
class FunctionSpec:
    """A reward function as the configuration names it."""

    function: str
    """`package.module:name` of a function or a class."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the function, or of the class's constructor."""
    deadline_s: float | None = None
    """Wall seconds of one call; None: those of the pool."""
    batch_size: int = CHUNK
    """Most responses of one call, where it takes a batch or is async."""
    bounded: bool = True
    """Whether its rewards have to be in [-1, 1]."""


@dataclass(frozen=True)
class RewardResult:
    """What the pool says of a batch of responses; every list is in the order of the items."""

    rewards: list[float]
    """Reward of each response; `FAILED_REWARD` where the answer timed out or its worker died."""
    correct: list[bool | None]
    """Whether the function says that a response is correct; None where it does not say; False where it failed."""
    timed_out: list[bool]
    """Whether the answer's worker was killed at the deadline."""
    died: list[bool]
    """Whether the answer's worker died under it (a crash, an exit, the memory limit)."""
    answer_seconds: list[float]
    """Wall seconds each answer took in its worker."""
    seconds: float
    """Wall seconds of the whole batch."""

    @classmethod
    def interleaved(cls, parts: Sequence[RewardResult]) -> RewardResult:
        """The result of all items, of which part i judged every n-th, from item i on."""
        count = sum(len(part.rewards) for part in parts)

        def joined(name: str) -> list:
            values = [None] * count
            for place, part in enumerate(parts):
                values[place :: len(parts)] = getattr(part, name)
            return values

        names = ("rewards", "correct", "timed_out", "died", "answer_seconds")
        return cls(*map(joined, names), seconds=max(part.seconds for part in parts))

    def metrics(self) -> dict[str, float]:
        """Counts of time-outs and deaths, seconds of the batch, and seconds per answer (largest and mean)."""
        return {
            "timeouts": sum(self.timed_out),
            "deaths": sum(self.died),
            "seconds": self.seconds,
            "answer_seconds_max": max(self.answer_seconds, default=0.0),
            "answer_seconds_mean": sum(self.answer_seconds) / max(len(self.answer_seconds), 1),
        }
