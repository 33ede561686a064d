"""What of the policy is in a checkpoint, in megatron-core's terms, and whether a checkpoint has all of it."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_g2rl.policy.model import unwrap
from megatron_g2rl.policy.optimizer import Optimizer

SHARDING = {
    # Moments and master weights are stored with the shapes of the weights, which any layout can cut anew.
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""How megatron is asked for the sharded state, the same when a checkpoint is written, read and converted."""


def model_keys(optimizer: Optimizer) -> list[str]:
    """The keys of the model chunks in `sharded_state`, in order."""
    return ["model"] if len(optimizer.chunks) == 1 else [f"model{i}" for i in range(len(optimizer.chunks))]


def sharded_state(optimizer: Optimizer, *, loading: bool, with_optimizer: bool = True) -> dict:
    """Megatron's sharded state of the chunks, and of optimizer and schedule with `with_optimizer`; a collective."""
    models = [unwrap(chunk) for chunk in optimizer.chunks]
    keys = model_keys(optimizer)
    state = {key: model.sharded_state_dict(metadata=SHARDING) for key, model in zip(keys, models, strict=True)}
    if with_optimizer:
        weights = state["model"] if len(models) == 1 else {k: state[k] for k in keys}
        state["optimizer"] = optimizer.megatron.sharded_state_dict(weights, is_loading=loading, metadata=SHARDING)
        state["schedule"] = optimizer.schedule.state_dict()
    return state


def stored_tensors(state: dict) -> Iterator[ShardedTensor]:
    """What of a sharded state is stored as tensors."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from stored_tensors({"built": value.build()})
        elif isinstance(value, ShardedTensor):
            yield value


def missing_tensors(state: dict, metadata: Metadata | None) -> list[str]:
    """Names of tensors of `state` that a checkpoint does not have, whole and of the same shape; a collective.

    Args:
        state: `sharded_state`, on every rank.
        metadata: the checkpoint's index, on the first rank.
    """
    needed = {tensor.key: tuple(tensor.global_shape) for tensor in stored_tensors(state)}
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, needed)
    missing: list = [None]
    if dist.get_rank() == 0:
        every = {key: shape for part in gathered for key, shape in part.items()}
        missing = [sorted(key for key, shape in every.items() if not _is_whole(metadata, key, shape))]
    dist.broadcast_object_list(missing, src=0)
    return missing[0]


def _is_whole(metadata: Metadata, key: str, shape: tuple[int, ...]) -> bool:
    stored = metadata.state_dict_metadata.get(key)
    if not isinstance(stored, TensorStorageMetadata) or tuple(stored.size) != shape:
        return False
    return sum(prod(chunk.sizes) for chunk in stored.chunks) >= prod(shape)
