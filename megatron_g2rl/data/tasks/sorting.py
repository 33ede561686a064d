"""Sorting: letters by their keys, a task with partial credit and several correct orders."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from string import ascii_lowercase

from megatron_g2rl.data.tasks.interface import Split, split_of
from megatron_g2rl.rewards.tasks.sorting import keys_of


@dataclass(frozen=True)
class Sorting:
    """Sort letters by their keys: `a3 b1 c4 d1` is solved by `\\boxed{bdac}` or `\\boxed{dbac}`.

    Letters with equal keys may be in any order. Measured difficulty: docs/data.md.
    """

    count: int = 10
    """Letters per problem."""
    largest: int = 5
    """Keys are drawn from 1 to this value."""
    name: str = "sorting"
    words: tuple[str, ...] = ("\\boxed{",)

    @property
    def problems(self) -> dict[Split, int]:
        return {"train": 20_000, "test": 512}

    def problem(self, index: int, seed: int, split: Split = "train") -> tuple[str, str]:
        keys = self._keys(index, seed, split)
        text = " ".join(f"{letter}{key}" for letter, key in keys.items())
        return text, "".join(sorted(keys, key=keys.__getitem__))

    def demonstration(self, index: int, seed: int, split: Split = "train") -> str:
        keys = keys_of(self.problem(index, seed, split)[0])
        letters = list(keys)
        Random(f"{self.name}/path/{split}/{seed}/{index}").shuffle(letters)
        return f"\\boxed{{{''.join(sorted(letters, key=keys.__getitem__))}}}"

    def _keys(self, index: int, seed: int, split: Split) -> dict[str, int]:
        random = Random(f"{self.name}/problem/{split}/{seed}/{index}")
        while True:
            keys = [random.randint(1, self.largest) for _ in range(self.count)]
            if split_of(sorted(keys)) == split:
                return dict(zip(ascii_lowercase, keys, strict=False))


SORTING = Sorting()
SORTING_LONG = Sorting(count=13)
