"""One pass over all tiles of logits that adds them to a running softmax: log-probs and entropy without Φ."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_g2rl.policy.head.products import Products
from megatron_g2rl.policy.head.softmax import RunningSoftmax
from megatron_g2rl.policy.head.tiles import Tiles, slices


def true_rows(weight: Tensor, vocab_start: int, vocab_size: int | None) -> int:
    """Number of this rank's rows that are not padding."""
    rows = weight.shape[0]
    return rows if vocab_size is None else min(max(vocab_size - vocab_start, 0), rows)


def sweep(
    products: Products,
    state: RunningSoftmax,
    vocab_start: int,
    tiles: Tiles,
    *,
    keep: bool = False,
    observe: Callable[[slice, slice, Tensor, Tensor], None] | None = None,
) -> dict[tuple[int, int], Tensor]:
    """Add all tiles to `state`, one at a time; with `keep`, retain as many of them as `tiles.kept` allows.

    The outer loop is over the vocabulary: its rows are read, and converted if necessary, only once.

    Args:
        observe: called with (tokens, vocabulary rows, exponentials, maximum subtracted from their logits) of each tile;
            the exponentials are valid during the call only.

    Returns:
        (first token, first column) -> logits / scale, of the tiles that are kept.
    """
    kept, room = {}, tiles.kept if keep else 0
    tokens, vocabulary = len(state.targets), len(products.weight)
    device = state.top.device
    cpu = device.type == "cpu"
    # On a GPU the results of a tile are allocated separately.
    scratch = torch.empty(2, min(tokens, tiles.rows) * tiles.columns if cpu else 0, dtype=products.dtype, device=device)
    for block in slices(vocabulary, tiles.columns):
        rows = products.rows(block)
        for at in slices(tokens, tiles.rows):
            shape = (at.stop - at.start, block.stop - block.start)
            work, exp = (part[: shape[0] * shape[1]].view(shape) if cpu else None for part in scratch)
            fits = room >= shape[0] * shape[1]
            z = products.logits(at, rows, torch.empty_like(work) if fits and cpu else work)
            if fits:
                room -= z.numel()
                kept[at.start, block.start] = z
            exp = state.add(at, z, vocab_start + block.start, products.scale, work, exp, sums_only=observe is None)
            if observe is not None:
                observe(at, block, exp, state.top[at])
            del z, exp
    return kept
