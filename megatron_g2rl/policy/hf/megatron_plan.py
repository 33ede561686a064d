"""Determines from megatron-core the keys and pieces under which it stores a model, without allocating the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.errors import UserError
from megatron_g2rl.policy.checkpoint.pieces import SHARDING, Piece, local_blocks
from megatron_g2rl.policy.model import GPTModel, padded_vocab_size, parallel_state, transformer_config
from megatron_g2rl.policy.models.architecture import Architecture
from megatron_g2rl.policy.models.families import Mapped, map_parameter
from megatron_g2rl.policy.models.shards import Shapes, join
from megatron_g2rl.policy.specs import layer_spec


@dataclass(frozen=True)
class Planned:
    """A parameter of the model: its Hugging Face tensors and the pieces that it is stored in."""

    mapped: Mapped
    hf_shapes: tuple[tuple[int, ...], ...]
    pieces: tuple[Piece, ...]
    """One piece, or two for a gated layer (gate and up projection, each of them a separate Hugging Face tensor)."""

    @property
    def kind(self) -> str:
        return self.mapped.rule.kind


@dataclass(frozen=True)
class ModelPlan:
    """Everything that megatron-core stores for a model."""

    parameters: tuple[Planned, ...]
    objects: tuple[str, ...]
    """Keys of objects that are not tensors: the extra state of layers, which is empty."""
    shapes: Shapes

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every Hugging Face tensor."""
        return {n: s for p in self.parameters for n, s in zip(p.mapped.hf, p.hf_shapes, strict=True)}


@contextmanager
def _process_groups() -> Iterator[None]:
    """Create Megatron's process groups with this process as their only member; building a model queries them."""
    if dist.is_initialized():
        raise UserError("torch.distributed is in use in this process: convert a checkpoint in a separate process")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def plan_model(architecture: Architecture) -> ModelPlan:
    """How megatron-core stores the model; takes about a second, or several with thousands of experts.

    Raises:
        UserError: torch.distributed is in use in this process.
        KeyError: the family's table lacks a parameter that the model has.
    """
    a, rows = architecture, padded_vocab_size(architecture.vocab_size, 1)
    shapes = Shapes(a.head_dim, a.key_value_groups, a.vocab_size, rows)
    config = transformer_config(
        a, PolicyConfig(device="cpu", precision="fp32", layer_spec="torch"), torch.device("cpu")
    )
    config.perform_initialization = False
    with _process_groups():
        with torch.device("meta"):
            model = GPTModel(
                config,
                layer_spec("torch", config, None),
                vocab_size=rows,
                max_sequence_length=a.max_positions,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=a.tied,
            )
        state = model.sharded_state_dict(metadata=SHARDING)
    layers = list(range(a.layers))
    parameters = tuple(
        _planned(map_parameter(a.family, name, layers, 0), parameter, state[name], shapes)
        for name, parameter in model.named_parameters()
    )
    objects = tuple(value.unique_key for value in state.values() if isinstance(value, ShardedObject))
    return ModelPlan(parameters, objects, shapes)


def _planned(mapped: Mapped, parameter: Tensor, stored, shapes: Shapes) -> Planned:
    pieces = tuple(block.piece for block in local_blocks(stored))
    tensors = join(mapped.rule.kind, [parameter.detach().to("meta")], shapes)
    hf_shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    expected = len(hf_shapes) if mapped.rule.kind == "gated" else 1
    assert len(pieces) == expected, f"megatron stores {mapped.rule.megatron} in {len(pieces)} pieces, not in {expected}"
    return Planned(mapped, hf_shapes, pieces)
