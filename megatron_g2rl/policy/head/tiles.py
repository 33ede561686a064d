"""Splits the table [tokens, vocabulary] of logits into tiles, so that only a small part exists at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Int

DEFAULT_CHUNK_TOKENS = 256
CPU_TILE = 2**18
"""Elements of a tile on a CPU: 1 MiB of float32 stays in a core's cache between the passes over it."""
CPU_COLUMNS = 1024
GPU_MULTIPLE = 256
"""Sides of a tile on a GPU are multiples of this if they are larger, to suit tensor cores."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles of one call."""

    rows: int
    """Tokens per tile."""
    columns: int
    """Vocabulary rows per tile."""
    kept: int = 0
    """Number of logits that forward may keep, so that backward need not recompute them."""
    strip: int = 1
    """Sweep from a prior: tokens of a tile whose exponentials exist at a time; divides `rows`."""


def score_tiles(tokens: int, vocabulary: int, chunk_tokens: int, device: torch.device) -> Tiles:
    """Tiles of the old-log-prob pass; all tiles of a row exist together, as Φ needs them after the partition sum.

    Args:
        tokens, vocabulary: sides of the table on this rank.
        chunk_tokens: a third of the memory, in rows of the table.
    """
    if device.type != "cpu":
        # Logits and exponentials are full rows of the table.
        return Tiles(max(1, min(tokens, chunk_tokens * 3 // 2)), max(1, vocabulary))
    vocabulary = max(1, vocabulary)
    columns = min(vocabulary, CPU_COLUMNS)
    # Exponentials are full rows, logits one tile. They do not fit in the cache anyway, and the weight is read again for
    # each row of tiles, so tiles twice as high as in the update pass are faster.
    limit = max(1, min(3 * chunk_tokens * vocabulary // (vocabulary + columns), 2 * CPU_TILE // columns))
    sweeps = max(1, math.ceil(tokens / limit))
    return Tiles(max(1, math.ceil(tokens / sweeps)), columns)


def update_tiles(tokens: int, vocabulary: int, chunk_tokens: int, device: torch.device) -> Tiles:
    """Tiles of the update pass, and of log-probs without Φ: one exists at a time, in addition to the kept ones.

    Their total stays below three float32 tables of `chunk_tokens` rows. On a GPU tiles are nearly square: accumulating
    both gradients reads and writes (1 / rows + 1 / columns) float32 numbers per logit, which is smallest for a square;
    in a tile as wide as the vocabulary it would take longer than the products.

    Args:
        tokens, vocabulary: sides of the table on this rank.
        chunk_tokens: a third of the memory, in rows of the table.
    """
    budget = max(1, chunk_tokens) * max(1, vocabulary)
    if device.type == "cpu":
        limit = min(budget, CPU_TILE)
        columns = max(1, min(vocabulary, CPU_COLUMNS, limit))
        # Two tiles are scratch: the logits and their exponentials.
        return Tiles(max(1, min(tokens, limit // columns)), columns, max(0, 3 * budget - 2 * limit))
    side = _round(max(math.isqrt(budget), budget // max(1, tokens)))
    columns = max(1, min(vocabulary, side))
    # A tile exists in float32 and, for products with 16-bit weights, also in 16 bits.
    return Tiles(max(1, min(tokens, _round(budget // columns))), columns, budget)


def prior_tiles(tokens: int, vocabulary: int, chunk_tokens: int) -> Tiles:
    """Tiles of the sweep from a prior on a CPU: as much memory as `update_tiles`, but taller tiles.

    A tile of logits is as high as possible, since the weight is read again for each row of tiles; its exponentials are
    computed and summed a strip at a time, which stays in the innermost cache that can hold it.

    Args:
        tokens, vocabulary: sides of the table on this rank.
        chunk_tokens: a third of the memory, in rows of the table.
    """
    budget = max(2, min(3 * max(1, chunk_tokens) * max(1, vocabulary), 2 * CPU_TILE))
    columns = max(1, min(vocabulary, CPU_COLUMNS, budget // 2))
    strip = max(1, budget // 8 // columns)
    strips = max(1, budget // columns // strip - 1)
    sweeps = max(1, math.ceil(tokens / (strips * strip)))
    return Tiles(max(1, math.ceil(tokens / sweeps / strip)) * strip, columns, strip=strip)


def slices(count: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` that cover `count`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _round(side: int) -> int:
    return side // GPU_MULTIPLE * GPU_MULTIPLE if side > GPU_MULTIPLE else side


def consecutive_runs(owner: Int[Tensor, "tokens"]) -> list[tuple[int, int]]:
    """(response, number of tokens) of each run of consecutive tokens of a response; the host waits for the device."""
    rows, lengths = torch.unique_consecutive(owner, return_counts=True)
    return list(zip(rows.tolist(), lengths.tolist(), strict=True))


def runs_in_tiles(runs: Sequence[tuple[int, int]], tile_rows: int) -> dict[int, list[tuple[int, slice]]]:
    """First token of a row of tiles -> (response, slice in the tile) of each run of tokens of one response."""
    result, start = defaultdict(list), 0
    for row, length in runs:
        end = start + length
        while start < end:
            first = start // tile_rows * tile_rows
            stop = min(end, first + tile_rows)
            result[first].append((row, slice(start - first, stop - first)))
            start = stop
    return result
