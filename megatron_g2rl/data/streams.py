"""The order in which prompts are drawn: a function of seed and position, so that a checkpoint holds one number.

Every rank walks the same order, so nothing is communicated.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from random import Random

from megatron_g2rl.records import Prompt

CYCLE = 1000
"""Draws in which every weighted source comes as often as its weight says, to the nearest draw."""


class PromptStream:
    """Cycles through a dataset indefinitely; the prompt at each position depends on the seed and the position only.

    In each epoch every prompt comes once, in an order of its own. Weighted sources have epochs of their own, and which
    source a position draws from is shuffled within each `CYCLE` positions.
    """

    def __init__(
        self,
        dataset: Sequence[Prompt],
        seed: int,
        shuffle: bool = True,
        parts: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        """Start at the first prompt.

        Args:
            dataset: prompts.
            seed: of the orders.
            shuffle: each epoch has an order of its own; False: that of the dataset.
            parts: number of prompts and weight of each of the sources that follow one another in `dataset`; None: they
                are one source.
        """
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle
        self.position = 0
        self._parts = _Mixture(parts, seed, shuffle) if parts else None
        self._orders: dict[int, tuple[int, Sequence[int]]] = {}

    def next(self, count: int, without: Collection[int] = ()) -> list[Prompt]:
        """Return the next `count` prompts, no two the same, and advance.

        A draw that crosses the end of an epoch passes over prompts that it holds already: responses are seeded by their
        prompt, and the group of a prompt drawn twice would be a copy.

        Args:
            count: prompts to draw.
            without: ids (`Prompt.id`) to pass over.

        Raises:
            ValueError: there are not so many prompts.
        """
        if count + len(without) > len(self.dataset):
            raise ValueError(f"cannot draw {count} other prompts than {len(without)} of {len(self.dataset)}")
        drawn: dict[int, Prompt] = {}
        taken: set[int] = set()
        while len(drawn) < count:
            place = self._place_at(self.position)
            if place not in taken:
                taken.add(place)
                prompt = self.dataset[place]
                if prompt.id not in without:
                    drawn[prompt.id] = prompt
            self.position += 1
        return list(drawn.values())

    def state_dict(self) -> dict[str, int]:
        """Return the position: prompts drawn so far, over all epochs."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a saved position."""
        self.position = state["position"]

    def _place_at(self, position: int) -> int:
        """Place in the dataset of the prompt at a position of the stream."""
        if self._parts is None:
            part, start, size, draw, name = 0, 0, len(self.dataset), position, ""
        else:
            part, start, size, draw = self._parts.draw(position)
            name = f"/{part}"
        epoch, offset = divmod(draw, size)
        if self._orders.get(part, (-1,))[0] != epoch:
            order = array("q", range(size))
            if self.shuffle:
                Random(f"prompts/{self.seed}/{epoch}{name}").shuffle(order)
            self._orders[part] = (epoch, order)
        return start + self._orders[part][1][offset]


class _Mixture:
    """Which source each position draws from."""

    def __init__(self, parts: Sequence[tuple[int, float]], seed: int, shuffle: bool) -> None:
        self._sizes = [size for size, _ in parts]
        self._starts = [sum(self._sizes[:part]) for part in range(len(parts))]
        self._seed, self._shuffle = seed, shuffle
        exact = [CYCLE * weight / sum(weight for _, weight in parts) for _, weight in parts]
        self._counts = [int(count) for count in exact]
        by_remainder = sorted(range(len(parts)), key=lambda part: self._counts[part] - exact[part])
        for part in by_remainder[: CYCLE - sum(self._counts)]:
            self._counts[part] += 1
        self._cycle: tuple[int, list[tuple[int, int]]] = (-1, [])

    def draw(self, position: int) -> tuple[int, int, int, int]:
        """Source at a position, where it begins in the dataset, its size, and how often it was drawn from before."""
        cycle, offset = divmod(position, CYCLE)
        if self._cycle[0] != cycle:
            self._cycle = (cycle, self._turns(cycle))
        part, before = self._cycle[1][offset]
        return part, self._starts[part], self._sizes[part], cycle * self._counts[part] + before

    def _turns(self, cycle: int) -> list[tuple[int, int]]:
        turns = [part for part, count in enumerate(self._counts) for _ in range(count)]
        Random(f"sources/{self._seed if self._shuffle else 0}/{cycle}").shuffle(turns)
        seen = [0] * len(self._counts)
        found = []
        for part in turns:
            found.append((part, seen[part]))
            seen[part] += 1
        return found
