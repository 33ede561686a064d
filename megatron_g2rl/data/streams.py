"""The order of prompts: a function of seed and position, so that a checkpoint stores a single number.

Every rank uses the same order, so there is no communication.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from random import Random

from megatron_g2rl.records import Prompt

CYCLE = 1000
"""Positions per cycle; within a cycle, the counts of weighted sources match their weights to the nearest integer."""


class PromptStream:
    """Cycles through a dataset indefinitely; the prompt at each position depends only on the seed and the position.

    Every epoch contains each prompt once, in a different order. Weighted sources have separate epochs, and the
    assignment of positions to sources is shuffled within each `CYCLE` positions.
    """

    def __init__(
        self,
        dataset: Sequence[Prompt],
        seed: int,
        shuffle: bool = True,
        parts: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        """Start at position 0.

        Args:
            dataset: the prompts.
            seed: seed of the shuffles.
            shuffle: shuffle each epoch; False: use the order of the dataset.
            parts: number of prompts and weight of each of the consecutive sources in `dataset`; None: a single source.
        """
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle
        self.position = 0
        self._parts = _Mixture(parts, seed, shuffle) if parts else None
        self._orders: dict[int, tuple[int, Sequence[int]]] = {}

    def next(self, count: int, without: Collection[int] = ()) -> list[Prompt]:
        """Return the next `count` distinct prompts and advance.

        A draw that crosses the end of an epoch skips prompts that it already contains: responses are seeded by their
        prompt, so the second group of a prompt would be a duplicate.

        Args:
            count: number of prompts.
            without: ids (`Prompt.id`) to skip.

        Raises:
            ValueError: the dataset has too few prompts.
        """
        if count + len(without) > len(self.dataset):
            raise ValueError(f"cannot draw {count} prompts: {len(without)} of {len(self.dataset)} are excluded")
        drawn: dict[int, Prompt] = {}
        taken: set[int] = set()
        while len(drawn) < count:
            index = self._index_at(self.position)
            if index not in taken:
                taken.add(index)
                prompt = self.dataset[index]
                if prompt.id not in without:
                    drawn[prompt.id] = prompt
            self.position += 1
        return list(drawn.values())

    def state_dict(self) -> dict[str, int]:
        """Return the position: number of prompts drawn so far, over all epochs."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a saved position."""
        self.position = state["position"]

    def _index_at(self, position: int) -> int:
        """Dataset index of the prompt at a position of the stream."""
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
    """Assigns positions to weighted sources."""

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
        """Source at a position, its start in the dataset, its size, and the number of earlier draws from it."""
        cycle, offset = divmod(position, CYCLE)
        if self._cycle[0] != cycle:
            self._cycle = (cycle, self._turns(cycle))
        part, before = self._cycle[1][offset]
        return part, self._starts[part], self._sizes[part], cycle * self._counts[part] + before

    def _turns(self, cycle: int) -> list[tuple[int, int]]:
        turns = [part for part, count in enumerate(self._counts) for _ in range(count)]
        Random(f"sources/{self._seed if self._shuffle else 0}/{cycle}").shuffle(turns)
        seen = [0] * len(self._counts)
        draws = []
        for part in turns:
            draws.append((part, seen[part]))
            seen[part] += 1
        return draws
