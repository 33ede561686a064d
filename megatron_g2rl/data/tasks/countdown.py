"""Countdown: reach a target from a few numbers, with several essentially different solutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from random import Random

from megatron_g2rl.data.tasks.interface import Split, split_of
from megatron_g2rl.rewards.tasks.countdown import LARGEST, apply, take_step
from megatron_g2rl.rewards.tasks.expressions import Form, number

TEST_ONE_IN = 8
"""One in this many multisets of numbers belongs to the test split."""

Solutions = dict[str, tuple[str, ...]]
"""Canonical form -> the chains of this form, in the order in which they are found."""


@dataclass(frozen=True)
class Countdown:
    """Reach a target from numbers with +, - and *: `3 3 5 2:12` is solved by `\\boxed{3*3=9,5-2=3,9+3=12}`.

    Every result is from 1 to 99. No target is one of the numbers or the result of one step, and each has at least
    `least_forms` solutions that are not the same expression in another order. Measured difficulty: docs/data.md.
    """

    count: int = 4
    """Numbers per problem."""
    largest: int = 9
    """Numbers are drawn from 1 to this value."""
    least_forms: int = 3
    """Smallest number of essentially different solutions."""
    name: str = "countdown"
    words: tuple[str, ...] = ("\\boxed{",)

    @property
    def problems(self) -> dict[Split, int]:
        return {"train": 6_000, "test": 256}

    def problem(self, index: int, seed: int, split: Split = "train") -> tuple[str, str]:
        numbers, target = self._problem(index, seed, split)
        chains = self._targets(tuple(sorted(numbers)))[target]
        return f"{' '.join(map(str, numbers))}:{target}", next(iter(chains.values()))[0]

    def demonstration(self, index: int, seed: int, split: Split = "train") -> str:
        numbers, target = self._problem(index, seed, split)
        random = Random(f"{self.name}/path/{split}/{seed}/{index}")
        by_form = self._targets(tuple(sorted(numbers)))[target]
        # Choose the form first, so that one with many orders of its steps is not more probable than others.
        return f"\\boxed{{{random.choice(by_form[random.choice(list(by_form))])}}}"

    def _problem(self, index: int, seed: int, split: Split) -> tuple[tuple[int, ...], int]:
        if split == "train":
            return self._drawn(Random(f"{self.name}/problem/{split}/{seed}/{index}"), split)
        return _distinct(self, seed, split)[index]

    def _drawn(self, random: Random, split: Split) -> tuple[tuple[int, ...], int]:
        while True:
            numbers = [random.randint(1, self.largest) for _ in range(self.count)]
            if split_of(sorted(numbers), TEST_ONE_IN) != split:
                continue
            if targets := self._targets(tuple(sorted(numbers))):
                return tuple(numbers), random.choice(list(targets))

    def _targets(self, numbers: tuple[int, ...]) -> dict[int, Solutions]:
        """The targets of a problem with these sorted numbers, in increasing order, and their solutions."""
        return _targets_with(numbers, self.least_forms)


@lru_cache(maxsize=8)
def _distinct(task: Countdown, seed: int, split: Split) -> tuple[tuple[tuple[int, ...], int], ...]:
    """The problems of a small split: no two have the same target and the same numbers in another order."""
    random = Random(f"{task.name}/problem/{split}/{seed}")
    found: dict[tuple[tuple[int, ...], int], tuple[tuple[int, ...], int]] = {}
    while len(found) < task.problems[split]:
        numbers, target = task._drawn(random, split)
        found.setdefault((tuple(sorted(numbers)), target), (numbers, target))
    return tuple(found.values())


@lru_cache(maxsize=10_000)
def _targets_with(numbers: tuple[int, ...], least_forms: int) -> dict[int, Solutions]:
    solutions: dict[int, dict[str, list[str]]] = {}
    easy = set(numbers)
    for chain, value, form in _chains([(value, number(value)) for value in numbers]):
        if "," not in chain:
            easy.add(value)
        solutions.setdefault(value, {}).setdefault(str(form), []).append(chain)
    return {
        value: {form: tuple(chains) for form, chains in sorted(by_form.items())}
        for value, by_form in sorted(solutions.items())
        if value not in easy and len(by_form) >= least_forms
    }


def _chains(available: list[tuple[int, Form]], before: str = "") -> Iterator[tuple[str, int, Form]]:
    """All chains of steps, shorter ones included, with the value and form of the last result.

    The larger number of a step is first, and steps that multiply by 1 are left out.
    """
    tried = set()
    for pair in combinations(available, 2):
        (small, _), (large, _) = sorted(pair, key=lambda one: one[0])
        for operator in "+-*":
            value = apply(operator, large, small)
            step = f"{large}{operator}{small}={value}"
            if not 1 <= value <= LARGEST or (operator == "*" and small == 1) or step in tried:
                continue
            tried.add(step)
            left = list(available)
            take_step(left, step)
            chain = before + step
            yield chain, *left[-1]
            if len(left) > 1:
                yield from _chains(left, f"{chain},")


COUNTDOWN = Countdown()
COUNTDOWN_LARGE = Countdown(largest=15)
