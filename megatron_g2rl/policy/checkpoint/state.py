"""The policy's state in a checkpoint as blocks of stored tensors, and the check that a checkpoint has all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from megatron_g2rl.distributed.collectives import gather
from megatron_g2rl.policy.checkpoint.optimizer_state import MASTER, blocks_to_save, digests, state_shards, stored_prefix
from megatron_g2rl.policy.checkpoint.pieces import SHARDING, LocalBlock, local_block, sharded_entries, stored_tensors
from megatron_g2rl.policy.checkpoint.shared_reading import SharedReading, data_parallel_group
from megatron_g2rl.policy.hf.megatron_folder import CRITIC, MegatronTensors
from megatron_g2rl.policy.model import unwrap
from megatron_g2rl.policy.optimizer import Optimizer


@dataclass(frozen=True)
class SavedState:
    """The parts of a checkpoint that this rank may write."""

    blocks: list[LocalBlock]
    objects: dict[str, Any]
    """Key -> object that is not a tensor: the extra state of layers."""
    common: dict[str, Any]
    """State that is the same on every rank and not stored as tensors; rank 0 writes it."""

    def with_critic(self, critic: SavedState) -> SavedState:
        """The parts of this model and of its critic, whose keys get the prefix `CRITIC`."""
        blocks = [replace(block, piece=block.piece.named(CRITIC)) for block in critic.blocks]
        objects = {CRITIC + key: value for key, value in critic.objects.items()}
        return SavedState(self.blocks + blocks, self.objects | objects, self.common | {"critic": critic.common})

    def tensors_of(self, plan: SavePlan) -> dict[Any, Tensor]:
        """The tensors of the plan's items by index, in host memory."""
        wanted = {item.index for item in plan.items if item.type != WriteItemType.BYTE_IO}
        tensors = {}
        for block in self.blocks:
            index = block.piece.index
            if index in wanted:
                tensors[index] = block.tensor.detach().to("cpu")
        return tensors


def saved_state(optimizer: Optimizer) -> SavedState:
    """State of the model chunks, of the optimizer (with digests) and of the schedule; a collective."""
    weights, objects = weight_blocks([unwrap(chunk) for chunk in optimizer.chunks])
    shards = state_shards(optimizer)
    blocks = [b for b in [*weights, *blocks_to_save(optimizer, shards)] if b.writable]
    common = {
        "optimizer": {"step": optimizer.steps, "digests": digests(shards)},
        "schedule": optimizer.schedule.state_dict(),
    }
    return SavedState(blocks, {entry.unique_key: entry.data for entry in objects}, common)


def weight_blocks(models: Sequence[nn.Module]) -> tuple[list[LocalBlock], list[ShardedObject]]:
    """The weights of this rank's chunks, and the other objects that their layers store."""
    state = [model.sharded_state_dict(metadata=SHARDING) for model in models]
    objects = [entry for entry in sharded_entries(state) if isinstance(entry, ShardedObject)]
    return [local_block(tensor) for tensor in stored_tensors(state)], objects


def read_weights(models: Sequence[nn.Module], reader: MegatronTensors, *, masters: bool = False) -> None:
    """Fill this rank's chunks from a Megatron folder written under any layout; a collective.

    Args:
        models: GPTModel chunks.
        reader: reader of the folder.
        masters: fill float32 parameters from the master weights if the weights are stored at lower precision. The
            optimizer loads its part of the master weights anyway, and all data-parallel ranks must have equal weights.

    Raises:
        WeightsError: part of a tensor is not stored, or cannot be read; on every rank.
    """
    reading = SharedReading()
    for block in weight_blocks(models)[0]:
        piece, stored = block.piece, reader.metadata.state_dict_metadata
        if masters and block.tensor.dtype == torch.float32 and stored[piece.key].properties.dtype != torch.float32:
            piece = piece.named(stored_prefix(MASTER, piece.key, reader))
        group = data_parallel_group(piece.key)
        reading.fill(block.tensor.detach(), lambda piece=piece: reader.read_rows(piece, 0, piece.rows), group)
    reading.finish()


@dataclass(frozen=True)
class Expected:
    """A tensor that this run needs from a checkpoint."""

    shape: tuple[int, ...]
    rows_axis: int | None
    """The axis along which the stored tensor may have another length, because of padding. None: the shape is exact."""


def expected_tensors(models: Sequence[nn.Module]) -> dict[str, Expected]:
    """Every weight tensor that any rank's chunks need, by key; a collective."""
    blocks, _ = weight_blocks(models)
    local = {b.piece.key: Expected(b.piece.stored, b.piece.leading if b.padded else None) for b in blocks}
    return {key: expected for part in gather(local) for key, expected in part.items()}


def missing_tensors(expected: Mapping[str, Expected], metadata: Metadata, prefixes: Sequence[str] = ("",)) -> list[str]:
    """Keys of expected tensors that a checkpoint lacks, or has incomplete or in another shape.

    Args:
        expected: expected weights by key.
        metadata: the checkpoint's index.
        prefixes: key prefixes under which each of them is expected; empty, or those of `state_prefix`.
    """
    return sorted(
        prefix + key
        for prefix in prefixes
        for key, tensor in expected.items()
        if not _is_complete(metadata.state_dict_metadata.get(prefix + key), tensor)
    )


def _is_complete(stored: object, expected: Expected) -> bool:
    if not isinstance(stored, TensorStorageMetadata) or len(stored.size) != len(expected.shape):
        return False
    same = all(
        a == b or n == expected.rows_axis for n, (a, b) in enumerate(zip(stored.size, expected.shape, strict=True))
    )
    return same and sum(prod(chunk.sizes) for chunk in stored.chunks) >= prod(stored.size)
