"""What a built-in task is, and the assignment of its problems to the training and test splits."""

from __future__ import annotations

import hashlib
from typing import Literal, Protocol

Split = Literal["train", "test"]

DATASET_SEED = 20_251_215
"""Seed of the problems that `load_prompts` serves; the SFT warm-up uses another seed."""


class Task(Protocol):
    """A source of problems with known answers."""

    name: str
    """Value of the column `builtin_task`, which selects the rules in `rewards.task_reward`; variants share it."""
    words: tuple[str, ...]
    """Strings of several characters that get their own token."""
    problems: dict[Split, int]
    """Number of problems in each split."""

    def problem(self, index: int, seed: int, split: Split = "train") -> tuple[str, str]:
        """Text and reference answer of problem `index`; the splits are disjoint for all seeds."""
        ...

    def demonstration(self, index: int, seed: int, split: Split = "train") -> str:
        """A response to `problem(index, seed, split)`: a correct solution path that ends in the boxed answer."""
        ...


def split_of(key: object, one_in: int = 16) -> Split:
    """Split of a problem, by a hash of what identifies it.

    Args:
        key: identifies the problem by its `repr`, such as its sorted numbers if their order does not matter.
        one_in: one in this many keys belongs to the test split.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % one_in == 0 else "train"
