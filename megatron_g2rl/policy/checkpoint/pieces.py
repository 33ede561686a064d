"""Blocks of stored tensors: how megatron-core's sharded state maps this rank's tensors to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

SHARDING = {
    # Moments and master weights are stored with the shapes of the weights, which any layout can split again.
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""Metadata for `sharded_state_dict`; the same when a folder is written, read or converted."""


@dataclass(frozen=True)
class Piece:
    """A block of a stored tensor. Layers, and experts inside a layer, are leading axes of the stored tensor."""

    key: str
    stored: tuple[int, ...]
    """Shape of the complete stored tensor."""
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    """Shape of the block, with as many axes as `stored`; 1 along the leading axes."""
    leading: int
    """Number of leading axes."""

    @property
    def index(self) -> MetadataIndex:
        """Key of the block in torch's index of a checkpoint."""
        return MetadataIndex(self.key, torch.Size(self.offset))

    @property
    def rows(self) -> int:
        """Length of the first axis after the leading ones."""
        return self.shape[self.leading]

    @property
    def columns(self) -> int:
        """Elements in a row: 1 for a vector."""
        return prod(self.shape[self.leading + 1 :])

    def narrow(self, start: int, end: int) -> Piece:
        """The rows `start` to `end` of this block."""
        n, offset, shape = self.leading, list(self.offset), list(self.shape)
        offset[n], shape[n] = offset[n] + start, end - start
        return replace(self, offset=tuple(offset), shape=tuple(shape))

    def named(self, prefix: str) -> Piece:
        """The same block of the tensor `prefix` + key."""
        return replace(self, key=prefix + self.key)


@dataclass(frozen=True)
class LocalBlock:
    """A block of a stored tensor with this rank's data for it."""

    piece: Piece
    tensor: Tensor
    """Shape `piece.shape` without the leading axes."""
    replica: tuple[int, ...]
    """Megatron's replica id: all zeros on one rank; the last number counts data-parallel ranks."""
    padded: bool
    """The stored tensor may have another number of rows: the padding of a vocabulary depends on the layout."""

    @property
    def writable(self) -> bool:
        """Whether it may be written: data-parallel replicas may; other copies (such as a tied head) may not."""
        return not any(self.replica[:-1])


def local_blocks(entry: ShardedTensor | ShardedTensorFactory) -> list[LocalBlock]:
    """The blocks of a parameter: one, or two for gated layers (gate and up projection, whose rows are consecutive)."""
    return [local_block(tensor) for tensor in stored_tensors([entry])]


def stored_tensors(state: Mapping | Sequence) -> Iterator[ShardedTensor]:
    """Every tensor of a nested sharded state as it is stored; factories are expanded."""
    for entry in sharded_entries(state):
        if not isinstance(entry, ShardedObject):
            yield from _values(entry.build() if isinstance(entry, ShardedTensorFactory) else entry)


def local_block(tensor: ShardedTensor) -> LocalBlock:
    """This rank's block of a stored tensor."""
    leading = tensor.prepend_axis_num
    piece = Piece(
        tensor.key,
        tuple(tensor.global_shape),
        tuple(tensor.global_offset),
        (1,) * leading + tuple(tensor.local_shape),
        leading,
    )
    replica = tensor.replica_id if isinstance(tensor.replica_id, tuple) else (tensor.replica_id,)
    return LocalBlock(piece, tensor.data, replica, tensor.allow_shape_mismatch)


def sharded_entries(state: Mapping | Sequence) -> Iterator[ShardedTensor | ShardedTensorFactory | ShardedObject]:
    """Every sharded value of a nested state, in order."""
    return (v for v in _values(state) if isinstance(v, ShardedTensor | ShardedTensorFactory | ShardedObject))


def _values(nested) -> Iterator:
    if isinstance(nested, Mapping):
        for value in nested.values():
            yield from _values(value)
    elif isinstance(nested, Sequence) and not isinstance(nested, str | bytes | torch.Size):
        for value in nested:
            yield from _values(value)
    else:
        yield nested
