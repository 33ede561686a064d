"""The layers of the transformer: Transformer Engine's (`te`), or torch's own (`torch`).

The torch layers are megatron's local layers with two replacements: RMSNorm (megatron's wrapper does not support
sequence parallelism) and core attention, which is causal attention over packed sequences, with context parallelism by
gathering keys and values. They run on a CPU, and on a GPU without Transformer Engine. They never synchronize with the
device.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.errors import UserError
from megatron_g2rl.policy import megatron_compat, transformer_engine


def choose_layer_spec(policy: PolicyConfig, device: torch.device) -> str:
    """Resolve `policy.layer_spec`: `auto` is `te` on CUDA with Transformer Engine and bf16, else `torch`.

    Transformer Engine's fused attention does not support fp32.

    Raises:
        UserError: `te` is requested and cannot run on this machine.
    """
    installed = device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None
    can_run = installed and policy.precision == "bf16"
    if policy.layer_spec == "te" and not can_run:
        reason = transformer_engine.why_not()
        unused = f" (it is installed, but not used: {reason})" if reason else ""
        raise UserError(
            f"policy.layer_spec=te needs CUDA, Transformer Engine{unused} and policy.precision=bf16; set "
            "policy.layer_spec=torch or auto"
        )
    if policy.layer_spec == "auto":
        return "te" if can_run else "torch"
    return policy.layer_spec


def layer_spec(name: str, config: TransformerConfig, vp_stage: int | None):
    """The megatron spec of this rank's layers.

    Args:
        name: `te` or `torch`.
        config: megatron's transformer configuration.
        vp_stage: model chunk in an interleaved pipeline, or None.
    """
    experts = config.num_moe_experts
    if name == "te":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=config.qk_layernorm
        )
    spec = get_gpt_layer_local_spec(num_experts=experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = TorchRMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = TorchRMSNorm
    attention.core_attention = PackedAttention
    if experts is not None:
        megatron_compat.allow_experts_without_transformer_engine()
        # The norm before experts is unfused under both specs: keep its own name in checkpoints.
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=TorchRMSNorm)


class TorchRMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm whose weight is included in the gradient sum of sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


class TokenRotary(torch.nn.Module):
    """Rotary frequencies per token, instead of a table by position.

    With the table, Megatron's unfused rotary embedding splits queries and keys at the bounds of the sequences, which it
    reads from the device in every layer. Without bounds, it uses per-token frequencies directly.
    """

    def __init__(self, table: RotaryEmbedding):
        super().__init__()
        self.table = table
        self._positions: Int[Tensor, "tokens"] | None = None

    def get_rotary_seq_len(
        self, inference_context, transformer, transformer_input, transformer_config, packed_seq_params=None
    ) -> int:
        """The table's value; GPTModel calls this just before `forward` and passes the packed sequences only here."""
        self._positions = getattr(packed_seq_params, "positions", None)
        given = (inference_context, transformer, transformer_input, transformer_config, packed_seq_params)
        return self.table.get_rotary_seq_len(*given)

    def forward(self, max_seq_len: int, **options: object) -> Float[Tensor, "tokens 1 head_dim"]:
        """Angles of each token; without `TorchPackedSeqParams`, the table."""
        table = self.table(max_seq_len, **options)
        return table if self._positions is None else table.index_select(0, self._positions).squeeze(1)


@dataclass
class TorchPackedSeqParams(PackedSeqParams):
    """Bounds of packed sequences for the torch layers; Megatron's own bounds fields stay empty (`TokenRotary`)."""

    bounds: tuple[int, ...] = ()
    """Bounds of the padded sequences before the context-parallel split."""
    cu_seqlens: Int[Tensor, "bounds"] | None = None
    """`bounds` on the device (int32)."""
    positions: Int[Tensor, "tokens"] | None = None
    """Positions of this rank's tokens in their sequences."""
    context_rank: int = 0
    context_size: int = 1

    @functools.cached_property
    def shards(self) -> ContextShards:
        """This rank's queries and keys under context parallelism; computed once for all layers."""
        return ContextShards.of(self.bounds, self.context_size, self.context_rank, self.cu_seqlens.device)


class ContextShards(NamedTuple):
    """This rank's chunks of queries, and the keys up to the end of each chunk."""

    query_bounds: tuple[int, ...]
    """Bounds of the chunks of local tokens; two chunks per sequence."""
    key_bounds: tuple[int, ...]
    """Bounds of each chunk's keys, in the order of `key_order`."""
    key_order: Int[Tensor, "keys"]
    """Indices of the keys in the concatenation of all ranks' tokens."""
    query_cu: Int[Tensor, "chunks+1"]
    key_cu: Int[Tensor, "chunks+1"]

    @classmethod
    def of(cls, bounds: tuple[int, ...], size: int, rank: int, device: torch.device) -> ContextShards:
        """The shards of sequences with these bounds, on context-parallel rank `rank` of `size`."""
        gathered = gathered_order(bounds, size)
        queries, keys, order = [0], [0], [torch.zeros(0, dtype=torch.long)]
        for start, end in itertools.pairwise(bounds):
            chunk = (end - start) // (2 * size)
            for number in (rank, 2 * size - 1 - rank) if chunk else ():
                queries.append(queries[-1] + chunk)
                keys.append(keys[-1] + (number + 1) * chunk)
                order.append(gathered[start : start + (number + 1) * chunk])
        cu = [torch.tensor(x, dtype=torch.int32).to(device) for x in (queries, keys)]
        return cls(tuple(queries), tuple(keys), torch.cat(order).to(device), *cu)


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences, with support for grouped queries."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context_group = groups.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Float[Tensor, "tokens heads head_dim"],
        key: Float[Tensor, "tokens kv_heads head_dim"],
        value: Float[Tensor, "tokens kv_heads head_dim"],
        attention_mask: None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params: TorchPackedSeqParams | None = None,
    ) -> Float[Tensor, "tokens heads*head_dim"]:
        """Attend within each packed sequence; under context parallelism, the inputs are this rank's part."""
        p = packed_seq_params
        if not isinstance(p, TorchPackedSeqParams):
            bounds, group = p.cu_seqlens_q, self.context_group
            p = TorchPackedSeqParams(bounds=tuple(bounds.tolist()), cu_seqlens=bounds)
            p.context_rank, p.context_size = group.rank(), group.size()
        queries = keys = p.bounds
        query_cu = key_cu = p.cu_seqlens
        if self.context_group.size() > 1:
            queries, keys, order, query_cu, key_cu = p.shards
            key, value = (
                gather_from_sequence_parallel_region(x.contiguous(), group=self.context_group).index_select(0, order)
                for x in (key, value)
            )
        grouped = query.shape[1] != key.shape[1]
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            # Causal mask aligned at the end: the last query of a chunk attends to all of its keys.
            options = dict(scale=self.softmax_scale, window_size=(-1, 0), enable_gqa=grouped)
            longest = (max(b - a for a, b in itertools.pairwise(x)) for x in (queries, keys))
            return varlen_attn(query, key, value, query_cu, key_cu, *longest, **options).flatten(1)
        spans = zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True)
        outputs = [self._attend(query[a:b], key[c:d], value[c:d], grouped) for (a, b), (c, d) in spans if b > a]
        return torch.cat(outputs).flatten(1)

    def _attend(self, query, key, value, grouped):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        if grouped and q.is_cuda:
            # Only flash attention supports grouped queries, and not in float32; others would build full matrices.
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        mask, (n, m) = None, (len(query), len(key))
        if n != m:
            mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.squeeze(0).transpose(0, 1)


def chunk_positions(length: int, size: int, rank: int) -> Int[Tensor, "local"]:
    """Positions of a sequence on context-parallel rank `rank` of `size`: chunks rank and 2*size-1-rank of 2*size.

    Args:
        length: padded sequence length, a multiple of 2*size (any length if size is 1).
    """
    if size == 1:
        return torch.arange(length)
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def gathered_order(bounds: tuple[int, ...], size: int) -> Int[Tensor, "tokens"]:
    """Index of each token of the packed batch in the concatenation of all context-parallel ranks' tokens."""
    total = bounds[-1]
    order = torch.empty(total, dtype=torch.long)
    for rank in range(size):
        for start, end in itertools.pairwise(bounds):
            if end > start:
                first = rank * (total // size) + start // size
                order[start + chunk_positions(end - start, size, rank)] = first + torch.arange((end - start) // size)
    return order
