"""Tracking: a long chain of operations on one number, in which every step must be right."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from megatron_g2rl.data.tasks.interface import Split, split_of
from megatron_g2rl.rewards.tasks.tracking import MODULUS, states_of


@dataclass(frozen=True)
class Tracking:
    """Apply operations modulo 10 one after another: `7:+5*3-8` is solved by `\\boxed{2,6,8}`.

    The solution is unique. Measured difficulty: docs/data.md.
    """

    steps: int = 12
    """Operations per problem."""
    largest: int = 9
    """Numbers that are added or subtracted are from 1 to this value."""
    largest_factor: int = 3
    """Factors are from 2 to this value."""
    name: str = "tracking"
    words: tuple[str, ...] = ("\\boxed{",)

    @property
    def problems(self) -> dict[Split, int]:
        return {"train": 20_000, "test": 512}

    def problem(self, index: int, seed: int, split: Split = "train") -> tuple[str, str]:
        random = Random(f"{self.name}/problem/{split}/{seed}/{index}")
        while True:
            text = f"{random.randrange(MODULUS)}:{''.join(self._operation(random) for _ in range(self.steps))}"
            if split_of(text) == split:
                return text, _joined(text)

    def demonstration(self, index: int, seed: int, split: Split = "train") -> str:
        return f"\\boxed{{{_joined(self.problem(index, seed, split)[0])}}}"

    def _operation(self, random: Random) -> str:
        operator = random.choice("+-*")
        low, high = (2, self.largest_factor) if operator == "*" else (1, self.largest)
        return f"{operator}{random.randint(low, high)}"


def _joined(problem: str) -> str:
    return ",".join(map(str, states_of(problem)))


TRACKING = Tracking()
TRACKING_LONG = Tracking(steps=16)
