"""Assigns the blocks of a checkpoint to the ranks that write them, and builds its index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from megatron_g2rl.distributed.collectives import gather_on_first_rank, scatter
from megatron_g2rl.policy.checkpoint.pieces import LocalBlock


class TorchDistWriter(FileSystemWriter):
    """torch's writer of one file per rank; its index omits the folder, which still has its temporary name."""

    def __init__(self, folder: Path):
        # Copying ahead is for tensors on a GPU: these tensors are in host memory.
        super().__init__(folder, per_thread_copy_ahead=0)
        self.set_up_storage_writer(True)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


@dataclass(frozen=True)
class Entry:
    """Metadata of a block, without its data, as sent to the planning rank."""

    key: str
    stored: tuple[int, ...]
    dtype: torch.dtype
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, block: LocalBlock) -> Entry:
        piece = block.piece
        return cls(piece.key, piece.stored, block.tensor.dtype, piece.offset, piece.shape)

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, torch.Size(self.offset))

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def write_item(self) -> WriteItem:
        chunk = ChunkStorageMetadata(torch.Size(self.offset), torch.Size(self.shape))
        data = TensorWriteData(chunk, TensorProperties(dtype=self.dtype), torch.Size(self.stored))
        return WriteItem(self.index, WriteItemType.SHARD, tensor_data=data)


@dataclass(frozen=True)
class Holdings:
    """The blocks and objects that a rank holds and may write."""

    entries: tuple[Entry, ...]
    objects: tuple[str, ...]
    """Keys of objects that are not tensors."""


def assign(holdings: Sequence[Holdings]) -> list[list[WriteItem]]:
    """Assign every block to one of the ranks that hold it, so that all ranks write about the same number of bytes.

    Args:
        holdings: one entry per rank.

    Returns:
        The items that each rank writes.
    """
    holders: dict[Entry, list[int]] = {}
    for rank, held in enumerate(holdings):
        for entry in held.entries:
            holders.setdefault(entry, []).append(rank)
    items: list[list[WriteItem]] = [[] for _ in holdings]
    load = [0] * len(holdings)
    # Blocks with a single holder first, then large blocks: small ones last, to balance the load.
    for entry, ranks in sorted(holders.items(), key=lambda held: (len(held[1]) > 1, -held[0].bytes)):
        rank = min(ranks, key=lambda r: (load[r], r))
        load[rank] += entry.bytes
        items[rank].append(entry.write_item())
    written: set[str] = set()
    for rank, held in enumerate(holdings):
        for key in held.objects:
            if key not in written:
                written.add(key)
                items[rank].append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
    return items


def index_of(items: Sequence[Sequence[WriteItem]]) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    """The index of a checkpoint that consists of `items`.

    Raises:
        ValueError: the blocks of a tensor do not cover it, or disagree on its shape or dtype.
    """
    index: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for item in (item for part in items for item in part):
        if item.type == WriteItemType.BYTE_IO:
            index[item.index.fqn] = BytesStorageMetadata()
            continue
        data = item.tensor_data
        stored = index.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
        if (stored.size, stored.properties.dtype) != (data.size, data.properties.dtype):
            raise ValueError(f"{item.index.fqn} has two shapes or dtypes")
        stored.chunks.append(data.chunk)
    for key, stored in index.items():
        if isinstance(stored, TensorStorageMetadata):
            covered = sum(prod(chunk.sizes) for chunk in stored.chunks)
            if covered != prod(stored.size):
                raise ValueError(f"{covered} of {prod(stored.size)} elements of {key} would be written")
    return index


class Planner:
    """Plans the saves of a run; the ranks exchange their holdings only if these have changed."""

    def __init__(self) -> None:
        self._holdings: Holdings | None = None
        self._plan: SavePlan | None = None
        self._index: Mapping | None = None

    def plan(self, blocks: Sequence[LocalBlock], objects: Sequence[str], writer: TorchDistWriter):
        """This rank's plan, and on rank 0 the index; a collective.

        Args:
            blocks: blocks that this rank holds and may write.
            objects: keys of objects that are not tensors.
            writer: the writer of this save.

        Raises:
            ValueError: a tensor would be written only in part; on every rank.
        """
        holdings = Holdings(tuple(Entry.of(block) for block in blocks), tuple(objects))
        changed = torch.tensor(int(holdings != self._holdings))
        dist.all_reduce(changed, dist.ReduceOp.MAX)
        if changed:
            self._exchange(holdings, writer)
        return self._plan, Metadata(dict(self._index)) if self._index is not None else None

    def _exchange(self, holdings: Holdings, writer: TorchDistWriter) -> None:
        gathered = gather_on_first_rank(holdings)
        plans: list | None = None
        if gathered is not None:
            items = assign(gathered)
            try:
                self._index = index_of(items)
                plans = writer.prepare_global_plan([SavePlan(part) for part in items])
            except ValueError as error:
                plans = [error] * len(gathered)
        plan = scatter(plans)
        if isinstance(plan, ValueError):
            raise plan
        self._holdings, self._plan = holdings, plan
