"""Sums of several numbers, in steps whose order is free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from megatron_g2rl.data.tasks.interface import Split, split_of


@dataclass(frozen=True)
class Arithmetic:
    """Add several numbers by a chain of equal sums: `8+4+9` is solved by `=12+9=21`, `=17+4=21` or `=8+13=21`.

    Each link adds any two of the remaining numbers, at the position of the first of them, so a problem of five numbers
    has 180 equally correct solution paths. Measured difficulty: docs/data.md.
    """

    terms: int = 5
    """Numbers per problem; mixed lengths, or subtraction, take the small model longer to learn."""
    largest: int = 9
    """Numbers are drawn from 1 to this value."""
    name: str = "arithmetic"
    words: tuple[str, ...] = ("\\boxed{",)

    @property
    def problems(self) -> dict[Split, int]:
        return {"train": 20_000, "test": 512}

    def problem(self, index: int, seed: int, split: Split = "train") -> tuple[str, str]:
        numbers = self._numbers(index, seed, split)
        return _expression(numbers), str(sum(numbers))

    def demonstration(self, index: int, seed: int, split: Split = "train") -> str:
        numbers = self._numbers(index, seed, split)
        random = Random(f"{self.name}/path/{split}/{seed}/{index}")
        links = []
        while len(numbers) > 1:
            first, second = sorted(random.sample(range(len(numbers)), 2))
            numbers[first] += numbers.pop(second)
            links.append(f"={_expression(numbers)}")
        return "".join(links) + f"\\boxed{{{numbers[0]}}}"

    def _numbers(self, index: int, seed: int, split: Split) -> list[int]:
        random = Random(f"{self.name}/problem/{split}/{seed}/{index}")
        while True:
            numbers = [random.randint(1, self.largest) for _ in range(self.terms)]
            if split_of(sorted(numbers)) == split:
                return numbers


def _expression(numbers: Sequence[int]) -> str:
    return "+".join(map(str, numbers))


ARITHMETIC = Arithmetic()
