"""Reads single tensors from a Megatron folder written under any layout, and writes such a folder block by block."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_g2rl.config.run_files import MANIFEST, MEGATRON
from megatron_g2rl.policy.checkpoint import manifest
from megatron_g2rl.policy.checkpoint.pieces import Piece
from megatron_g2rl.policy.checkpoint.plan import TorchDistWriter
from megatron_g2rl.policy.checkpoint.safe_pickle import CorruptPickle, check_pickles, read_metadata
from megatron_g2rl.policy.hf.megatron_plan import ModelPlan
from megatron_g2rl.policy.hf.tensor_folder import WeightsError

FILE_BYTES = 4 << 30
"""Size of a file's tensors at which the next file is started, so that many readers can read a large model."""
BLOCK_BYTES = 64 << 20
"""Size of the largest block that is written or read at a time."""
_OPTIMIZER = "optimizer."
CRITIC = "critic."
"""Prefix of the keys of a critic in the checkpoint of a policy."""


class _Target(DefaultLoadPlanner):
    """Maps the blocks that a reader reads to slices of one tensor."""

    def __init__(self, tensor: Tensor):
        super().__init__()
        self.tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        sizes = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self.tensor[tuple(slice(start, start + size) for start, size in sizes)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class MegatronTensors:
    """Reads blocks of stored tensors of a model, one at a time."""

    def __init__(self, folder: str | Path, prefix: str = ""):
        """Read the index.

        Args:
            folder: the Megatron folder.
            prefix: of the keys of the model, which the keys of `metadata` lack: that of the policy, or `CRITIC`.

        Raises:
            UnsafePickle: a pickle in the folder could run code; nothing was executed.
            WeightsError: a file is missing, or a pickle is corrupt.
        """
        self.folder = Path(folder)
        try:
            check_pickles(self.folder / MEGATRON)
            stored = read_metadata(self.folder / MEGATRON)
        except (CorruptPickle, OSError, ValueError) as error:
            raise _corrupt(self.folder, str(error)) from error
        self._locations = stored.storage_data
        self.metadata = _of_model(stored, prefix)
        self._reader = FileSystemReader(self.folder / MEGATRON)
        self._reader.set_up_storage_reader(self.metadata, True)
        self._blocks: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def check(self) -> None:
        """Refuse an incomplete folder, or one with a missing or truncated file; the tensors are not read.

        Raises:
            WeightsError: names the file.
        """
        if not (self.folder / MANIFEST).is_file():
            raise _corrupt(self.folder, f"{MANIFEST} is missing: the folder is incomplete")
        ends: dict[str, int] = {}
        for location in self._locations.values():
            ends[location.relative_path] = max(ends.get(location.relative_path, 0), location.offset + location.length)
        for name, end in ends.items():
            file = self.folder / MEGATRON / name
            size = file.stat().st_size if file.is_file() else 0
            if size < end:
                raise _corrupt(self.folder, f"{MEGATRON}/{name} is truncated: {size} of {end} bytes")

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Every stored tensor of the model, by key, without those of the optimizer."""
        items = self.metadata.state_dict_metadata.items()
        return {k: v for k, v in items if isinstance(v, TensorStorageMetadata) and not k.startswith(_OPTIMIZER)}

    def read(self, piece: Piece, rows: int | None = None) -> Tensor:
        """Read a piece as a tensor without leading axes.

        Args:
            piece: the piece to read.
            rows: number of rows to read if not all, to skip the padding of a vocabulary.

        Raises:
            WeightsError: part of it is not stored, or its file cannot be read.
        """
        stored = self.metadata.state_dict_metadata[piece.key]
        n, shape = piece.leading, list(piece.shape)
        shape[n] = rows or shape[n]
        target, items, covered = torch.empty(shape, dtype=stored.properties.dtype), [], 0
        for block in self._grouped(piece.key, n).get(piece.offset[:n], ()):
            low = [max(a, b) for a, b in zip(piece.offset, block.offsets, strict=True)]
            high = [
                min(a + x, b + y) for a, x, b, y in zip(piece.offset, shape, block.offsets, block.sizes, strict=True)
            ]
            lengths = torch.Size(max(0, b - a) for a, b in zip(low, high, strict=True))
            if lengths.numel() == 0:
                continue
            covered += lengths.numel()
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(piece.key, piece.offset),
                    dest_offsets=torch.Size(a - b for a, b in zip(low, piece.offset, strict=True)),
                    storage_index=MetadataIndex(piece.key, block.offsets),
                    storage_offsets=torch.Size(a - b for a, b in zip(low, block.offsets, strict=True)),
                    lengths=lengths,
                )
            )
        if covered != prod(shape):
            raise WeightsError(
                f"{self.folder}: {piece.key} is stored only in part: {covered} of {prod(shape)} elements"
            )
        try:
            # One block at a time: within a call, a reader keeps everything that it has read from a file.
            for item in items:
                self._reader.read_data(LoadPlan([item]), _Target(target)).wait()
        except Exception as error:  # a corrupt file can raise anything
            raise _corrupt(self.folder, f"{piece.key} cannot be read ({error})") from error
        return target.view(shape[n:])

    def read_rows(self, piece: Piece, start: int, end: int) -> Tensor:
        """Read the rows `start` to `end` of a piece; rows past the end of the stored tensor are padding, filled with 0.

        Raises:
            WeightsError: as `read`.
        """
        stored = self.metadata.state_dict_metadata[piece.key].size[piece.leading]
        stored_end = max(start, min(end, stored - piece.offset[piece.leading]))
        rows = self.read(piece.narrow(start, stored_end)) if stored_end > start else None
        if stored_end == end:
            return rows
        shape = piece.narrow(start, end).shape[piece.leading :]
        padded = torch.zeros(shape, dtype=self.metadata.state_dict_metadata[piece.key].properties.dtype)
        if rows is not None:
            padded[: stored_end - start] = rows
        return padded

    def _grouped(self, key: str, leading: int) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
        """Blocks of a stored tensor by position along the leading axes; thousands of experts can have the same key."""
        if (key, leading) not in self._blocks:
            groups = self._blocks[key, leading] = {}
            for block in self.metadata.state_dict_metadata[key].chunks:
                groups.setdefault(tuple(block.offsets)[:leading], []).append(block)
        return self._blocks[key, leading]


def _of_model(index: Metadata, prefix: str) -> Metadata:
    """The part of an index that belongs to one model, with its keys without their prefix."""

    def belongs(key: str) -> bool:
        return key.startswith(CRITIC) == (prefix == CRITIC)

    tensors = {k.removeprefix(prefix): v for k, v in index.state_dict_metadata.items() if belongs(k)}
    locations = {
        replace(place, fqn=place.fqn.removeprefix(prefix)): location
        for place, location in index.storage_data.items()
        if belongs(place.fqn)
    }
    return replace(index, state_dict_metadata=tensors, storage_data=locations)


def _corrupt(folder: Path, message: str) -> WeightsError:
    return WeightsError(f"{manifest.corruption_message(folder, [message])}. {manifest.REMEDY}")


class _Source(DefaultSavePlanner):
    """Reads the data of an item when it is written."""

    def __init__(self, read: Callable[[int, int, int], Tensor], places: dict[MetadataIndex, tuple[int, int, int]]):
        super().__init__()
        self.read, self.places = read, places

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([None], content)
            return content
        data = self.read(*self.places[write_item.index])
        return data.reshape(write_item.tensor_data.chunk.sizes)


def write_megatron(
    folder: Path,
    plan: ModelPlan,
    dtypes: Sequence[torch.dtype],
    read: Callable[[int, int, int, int], Tensor],
) -> None:
    """Write torch_dist files that any layout can load, one block in memory at a time.

    Args:
        folder: folder of the files; created.
        plan: plan of the model.
        dtypes: dtype of each parameter of the plan.
        read: (parameter, piece of it, first row, end row) -> these rows of the piece; called in this order.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True)
    writer = TorchDistWriter(folder)
    files, tensors, places = _items(plan, dtypes)
    planner = _Source(read, places)
    plans = writer.prepare_global_plan([SavePlan(items) for items in files])
    results = [writer.write_data(part, planner).value() for part in plans]
    objects = {key: BytesStorageMetadata() for key in plan.objects}
    writer.finish(Metadata(tensors | objects), results)
    torch.save({}, folder / "common.pt")
    write_format(folder)


def write_format(folder: Path) -> None:
    """Write the metadata from which megatron.core.dist_checkpointing detects the format of the folder."""
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends))


def _items(plan: ModelPlan, dtypes: Sequence[torch.dtype]):
    """(items of each file, index of tensors, position of each item in the plan)."""
    files: list[list[WriteItem]] = [[]]
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, tuple[int, int, int, int]] = {}
    size = 0
    for number, (parameter, dtype) in enumerate(zip(plan.parameters, dtypes, strict=True)):
        for part, piece in enumerate(parameter.pieces):
            large = prod(piece.shape) * dtype.itemsize
            if size and size + large > FILE_BYTES:
                files.append([])
                size = 0
            size += large
            stored = tensors.setdefault(
                piece.key, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(piece.stored), [])
            )
            for chunk, rows in _chunks(piece, dtype):
                stored.chunks.append(chunk)
                index = MetadataIndex(piece.key, chunk.offsets)
                places[index] = (number, part, *rows)
                data = TensorWriteData(chunk, stored.properties, stored.size)
                files[-1].append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    files[-1] += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in plan.objects]
    return files, tensors, places


def _chunks(piece: Piece, dtype: torch.dtype) -> Iterator[tuple[ChunkStorageMetadata, tuple[int, int]]]:
    """A piece as blocks of rows of at most BLOCK_BYTES (but at least one row), with their row ranges."""
    n = piece.leading
    total, row_bytes = piece.shape[n], prod(piece.shape[n + 1 :]) * dtype.itemsize
    rows = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, total, rows):
        end = min(start + rows, total)
        offset, shape = list(piece.offset), list(piece.shape)
        offset[n], shape[n] = offset[n] + start, end - start
        yield ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)), (start, end)
