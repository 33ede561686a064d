"""Splits Hugging Face tensors into the shard of one tensor-parallel rank, and joins shards into full tensors.

Pure functions of tensors: no process groups, no files. `split` and `join` are inverses of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_g2rl.policy.models.families import Kind


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model that determine how its tensors are split."""

    head_dim: int
    key_value_groups: int
    vocab_size: int
    padded_vocab_size: int


def split(kind: Kind, tensors: Sequence[Tensor], shapes: Shapes, rank: int, size: int) -> Tensor:
    """The shard of tensor-parallel rank `rank` of `size`.

    Args:
        kind: how the tensors are joined and split.
        tensors: full Hugging Face tensors, in the rule's order.
        shapes: sizes of the model.
        rank, size: tensor-parallel rank and size.
    """
    if kind == "replicated":
        return tensors[0]
    if kind == "vocab":
        rows = shapes.padded_vocab_size // size
        part = tensors[0][rank * rows : (rank + 1) * rows]
        missing = rows - part.shape[0]
        return torch.cat([part, part.new_zeros(missing, part.shape[1])]) if missing else part
    if kind == "column":
        return tensors[0].chunk(size, 0)[rank]
    if kind == "row":
        return tensors[0].chunk(size, 1)[rank]
    if kind == "gated":
        return torch.cat([t.chunk(size, 0)[rank] for t in tensors])
    groups = [t.unflatten(0, (shapes.key_value_groups, -1)) for t in tensors]
    return torch.cat(groups, 1).chunk(size, 0)[rank].flatten(0, 1)


def join(kind: Kind, shards: Sequence[Tensor], shapes: Shapes) -> list[Tensor]:
    """The full Hugging Face tensors, in the rule's order, from the shards of all tensor-parallel ranks."""
    if kind == "replicated":
        return [shards[0]]
    if kind == "vocab":
        return [_concatenated(shards, 0)[: shapes.vocab_size]]
    if kind == "column":
        return [_concatenated(shards, 0)]
    if kind == "row":
        return [_concatenated(shards, 1)]
    if kind == "gated":
        halves = [s.chunk(2, 0) for s in shards]
        return [torch.cat([h[i] for h in halves]) for i in (0, 1)]
    groups = torch.cat([s.unflatten(0, (shapes.key_value_groups // len(shards), -1)) for s in shards])
    d = shapes.head_dim
    queries = groups.shape[1] - 2 * d
    return [part.flatten(0, 1) for part in groups.split([queries, d, d], 1)]


def _concatenated(shards: Sequence[Tensor], axis: int) -> Tensor:
    """All shards as one tensor; copied only if there are several."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), axis)
