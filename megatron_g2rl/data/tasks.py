"""Generated tasks for the quickstart and the tests: any number of problems, no download, verifiable answers.

A task generates problems and *demonstrations*: worked solutions, each sampled from the many correct ones. A model
fine-tuned on them spreads its probability over different solution paths, which exploration needs. Everything is a pure
function of (split, seed, index). Deliberately omitted: natural language and anything that needs a model too large for a
laptop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

Split = Literal["train", "test"]

DATASET_SEED = 20_251_215
"""Seed of the problems that `load_prompts` serves; the SFT warm-up uses another seed."""

TEST_ONE_IN = 16
"""One in this many problems belongs to the test split, by a hash of the problem."""


class Task(Protocol):
    """A source of problems with known answers."""

    name: str
    """Name in `builtin:NAME`."""
    words: tuple[str, ...]
    """Strings of several characters that get their own token."""
    problems: dict[Split, int]
    """Number of problems in each split."""

    def problem(self, index: int, seed: int, split: Split = "train") -> tuple[str, str]:
        """Text and answer of problem `index`; the splits are disjoint for all seeds."""
        ...

    def demonstration(self, index: int, seed: int, split: Split = "train") -> str:
        """A response to `problem(index, seed, split)`: a correct solution path that ends in the boxed answer."""
        ...


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
            if split_of(numbers) == split:
                return numbers


def split_of(numbers: Sequence[int]) -> Split:
    """Split of a multiset of numbers; independent of their order."""
    digest = hashlib.blake2b(repr(sorted(numbers)).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % TEST_ONE_IN == 0 else "train"


def _expression(numbers: Sequence[int]) -> str:
    return "+".join(map(str, numbers))


BUILTIN_TASKS: dict[str, Task] = {task.name: task for task in [Arithmetic()]}
"""Tasks available as `data.source: builtin:NAME`."""
