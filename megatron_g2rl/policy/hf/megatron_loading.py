"""Loads the weights of a Megatron folder into the model of a run, and refuses weights of another model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_g2rl.distributed.collectives import on_all_ranks
from megatron_g2rl.policy.checkpoint import manifest
from megatron_g2rl.policy.checkpoint.state import expected_tensors, read_weights
from megatron_g2rl.policy.hf.megatron_folder import MegatronTensors
from megatron_g2rl.policy.hf.tensor_folder import WeightsError


def load_chunks(folder: str | Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Fill this rank's model chunks from a Megatron folder written under any layout; a collective.

    Args:
        folder: a converted model, or a checkpoint of a run, of which only the weights are read.
        chunks: GPTModel chunks.

    Raises:
        WeightsError: the folder is corrupt, or a tensor is missing, has another shape or is not part of the model.
        UnsafePickle: a pickle in it could run code.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    found = on_all_ranks(
        lambda: manifest.find_corruption(Path(folder), rank, world), f"{folder} cannot be read", WeightsError
    )
    if messages := sorted({message for part in found for message in part}):
        raise WeightsError(f"{manifest.corruption_message(folder, messages)}. {manifest.REMEDY}")
    source = MegatronTensors(folder)
    expected = expected_tensors(chunks)
    compare(
        folder,
        source.tensors(),
        {key: tensor.shape for key, tensor in expected.items()},
        {key for key, tensor in expected.items() if tensor.rows_axis is not None},
    )
    read_weights(chunks, source)


def compare(
    folder: str | Path, stored: dict[str, TensorStorageMetadata], expected: dict[str, tuple[int, ...]], padded: set[str]
) -> None:
    """Refuse stored tensors that do not match the model.

    Args:
        folder: for the message.
        stored: tensors of the folder by key.
        expected: shapes by key.
        padded: keys of tensors whose first axis is the padded vocabulary, which may have another length in the folder.

    Raises:
        WeightsError: a tensor is missing, has another shape or is not part of the model; the message names it.
    """
    for key, shape in expected.items():
        if key not in stored:
            raise WeightsError(
                f"{folder}: tensor {key!r} is missing: the weights do not match the folder's config.json"
            )
        start = 1 if key in padded else 0
        if tuple(stored[key].size)[start:] != shape[start:]:
            raise WeightsError(
                f"{folder}: tensor {key!r} has shape {tuple(stored[key].size)}, expected {shape}: the weights do not "
                "match the folder's config.json"
            )
    if extra := sorted(stored.keys() - expected.keys()):
        raise WeightsError(
            f"{folder}: tensor {extra[0]!r} is not part of this architecture: the weights do not match the folder's "
            "config.json"
        )
