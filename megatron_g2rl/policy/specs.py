"""The layers of the transformer: Transformer Engine's (`te`), or torch's own (`torch`).

The torch layers are megatron's local ones with two replaced: RMSNorm (megatron's stand-in refuses sequence parallelism)
and core attention, which is scaled_dot_product_attention over packed sequences, with context parallelism by gathering
keys and values. They run on a CPU, and on a GPU without Transformer Engine.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from megatron_g2rl.config.tree import PolicyConfig
from megatron_g2rl.errors import UserError
from megatron_g2rl.policy import megatron_compat, transformer_engine


def choose_layer_spec(policy: PolicyConfig, device: torch.device) -> str:
    """Resolve `policy.layer_spec`: `auto` is `te` on CUDA with Transformer Engine and bf16, else `torch`.

    Transformer Engine's fused attention takes no fp32.

    Raises:
        UserError: `te` is asked for and cannot run here.
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
        # Experts read an unfused norm under both specs: keep its own name in checkpoints.
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=TorchRMSNorm)


class TorchRMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm whose weight takes part in the gradient sum of sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


class PackedAttention(MegatronModule):
    """Causal attention over packed sequences by scaled_dot_product_attention, grouped queries included."""

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
        packed_seq_params=None,
    ) -> Float[Tensor, "tokens heads*head_dim"]:
        """Attend inside each packed sequence; tokens are this rank's share under context parallelism."""
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        size = self.context_group.size()
        if size > 1:
            outputs = self._attend_shared(query, key, value, bounds, size)
        else:
            spans = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
            outputs = [self._attend(query[s], key[s], value[s]) for s in spans]
        return torch.cat(outputs).flatten(1)

    def _attend_shared(self, query, key, value, bounds, size):
        """Context parallelism: keys and values of the whole sequences, queries of this rank's two chunks of each."""
        rank = self.context_group.rank()
        order = gathered_order(torch.tensor(bounds), size).to(key.device)
        keys, values = (
            gather_from_sequence_parallel_region(x.contiguous(), group=self.context_group)[order] for x in (key, value)
        )
        outputs = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            if end > start:
                local = slice(start // size, end // size)
                positions = chunk_positions(end - start, size, rank).to(key.device)
                mask = torch.arange(end - start, device=key.device) <= positions[:, None]
                outputs.append(self._attend(query[local], keys[start:end], values[start:end], mask))
        return outputs

    def _attend(self, query, key, value, mask=None):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=grouped
        )
        return out.squeeze(0).transpose(0, 1)


def chunk_positions(length: int, size: int, rank: int) -> Int[Tensor, "local"]:
    """Positions of a sequence that context-parallel rank `rank` of `size` holds: chunks rank, 2*size-1-rank of 2*size.

    Args:
        length: padded sequence length, a multiple of 2*size (of 1 when size is 1).
    """
    if size == 1:
        return torch.arange(length)
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def gathered_order(cu_seqlens: Int[Tensor, "sequences+1"], size: int) -> Int[Tensor, "tokens"]:
    """Where each token of the packed batch stands in the concatenation of all context-parallel ranks' shares."""
    bounds, total = cu_seqlens.tolist(), int(cu_seqlens[-1])
    order = torch.empty(total, dtype=torch.long)
    for rank in range(size):
        for start, end in zip(bounds, bounds[1:], strict=False):
            here = rank * (total // size) + start // size
            order[start + chunk_positions(end - start, size, rank)] = here + torch.arange((end - start) // size)
    return order
