"""Generated tasks for the quickstart and the tests: as many problems as wanted, no download, answers for math-verify.

A task makes problems and *demonstrations*: worked solutions, each drawn at random from the many that are right. A model
warmed up on them spreads its probability over different solution paths, which is what exploration needs to act on.
Everything is a pure function of (split, seed, index). Left out on purpose: natural language and anything that needs a
model larger than a laptop's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

Split = Literal["train", "test"]

DATASET_SEED = 20_251_215
"""Seed of the problems that `load_prompts` serves; warm starts draw theirs from another one."""

TEST_SHARE = 16
"""One problem in this many belongs to the test split, by a hash of what the problem is."""


class Task(Protocol):
    """A source of problems with known answers."""

    name: str
    """What `builtin:NAME` calls it."""
    words: tuple[str, ...]
    """Strings of more than one character that deserve a token of their own."""
    problems: dict[Split, int]
    """Problems that each split serves as a dataset."""

    def problem(self, index: int, seed: int, split: Split = "train") -> tuple[str, str]:
        """Problem text and answer number `index`; no problem of one split appears in the other, whatever the seeds."""
        ...

    def demonstration(self, index: int, seed: int, split: Split = "train") -> str:
        """A response to `problem(index, seed, split)`: one of the right solution paths, ending in the boxed answer."""
        ...


@dataclass(frozen=True)
class Arithmetic:
    """Add up several numbers by a chain of equal sums: `8+4+9` by `=12+9=21`, `=17+4=21` or `=8+13=21`.

    Each link joins any two of the numbers that are left, at the place of the first of them, so a problem of five
    numbers has 180 solution paths, all as right as each other. Measured difficulty: docs/data.md.
    """

    terms: int = 5
    """Numbers in a problem; a mixture of lengths, or subtraction, takes the small model longer to learn."""
    largest: int = 9
    """Numbers are drawn from 1 to this."""
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
    """Split that a multiset of numbers belongs to: their order makes no new problem."""
    digest = hashlib.blake2b(repr(sorted(numbers)).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % TEST_SHARE == 0 else "train"


def _expression(numbers: Sequence[int]) -> str:
    return "+".join(map(str, numbers))


BUILTIN_TASKS: dict[str, Task] = {task.name: task for task in [Arithmetic()]}
"""What `data.source: builtin:NAME` can name."""
