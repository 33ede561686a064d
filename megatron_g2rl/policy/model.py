"""Builds this rank's part of the model: Megatron's GPTModel with a `LanguageModelHead` as its output layer."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.config.stages import check_stages, stage_layers
from megatron_g2rl.errors import UserError
from megatron_g2rl.policy import head, transformer_engine
from megatron_g2rl.policy.models.architecture import Architecture
from megatron_g2rl.policy.models.families import map_parameter
from megatron_g2rl.policy.packing import PackedBatch
from megatron_g2rl.policy.runtime import Runtime
from megatron_g2rl.policy.specs import TokenRotary, TorchPackedSeqParams, choose_layer_spec, layer_spec

VOCABULARY_MULTIPLE = 128
"""The padded vocabulary size is a multiple of this and of the tensor-parallel size; usually equal for all layouts."""


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Number of vocabulary rows including padding."""
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor_parallel)
    return -(-vocab_size // multiple) * multiple


def transformer_config(architecture: Architecture, policy: PolicyConfig, device: torch.device) -> TransformerConfig:
    """Megatron's configuration of `architecture` under the layout and precision of `policy`.

    Raises:
        UserError: its layers cannot be split into the pipeline's stages.
    """
    a = architecture
    if problem := check_stages(policy, a.layers):
        raise UserError(problem)
    dtype = torch.bfloat16 if policy.precision == "bf16" else torch.float32
    te = choose_layer_spec(policy, device) == "te"
    interleaved = policy.virtual_stages > 1
    options = {}
    if a.experts is not None:
        options = dict(
            num_moe_experts=a.experts,
            moe_ffn_hidden_size=a.expert_ffn_hidden,
            moe_router_topk=a.experts_per_token,
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
            moe_token_dispatcher_type="alltoall",
            moe_grouped_gemm=te,
        )
    if policy.pipeline_layout:
        options |= dict(pipeline_model_parallel_layout=_stages(policy, a.layers))
    if policy.recompute == "full":
        options |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    elif policy.recompute == "selective":
        options |= dict(recompute_granularity="selective")
    return TransformerConfig(
        num_layers=a.layers,
        hidden_size=a.hidden,
        ffn_hidden_size=a.ffn_hidden,
        num_attention_heads=a.heads,
        num_query_groups=a.key_value_groups,
        kv_channels=a.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=a.norm_epsilon,
        qk_layernorm=a.family.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=a.family.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # All weights are loaded later; Megatron sets its parameter attributes during CPU initialization.
        use_cpu_initialization=device.type == "cpu",
        tensor_model_parallel_size=policy.tensor_parallel,
        sequence_parallel=policy.sequence_parallel,
        pipeline_model_parallel_size=policy.pipeline_parallel,
        virtual_pipeline_model_parallel_size=policy.virtual_stages if interleaved else None,
        # Megatron's batched exchange is silently wrong over gloo in the interleaved schedule (off by 2e-2).
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=policy.context_parallel,
        expert_model_parallel_size=policy.expert_parallel,
        expert_tensor_parallel_size=1 if policy.expert_parallel > 1 else None,
        # The losses are already normalized over the full update: no further averaging anywhere.
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
        masked_softmax_fusion=False,
        apply_rope_fusion=te,
        bias_activation_fusion=te,
        moe_permute_fusion=te and a.experts is not None,
        gradient_accumulation_fusion=importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        **options,
    )


def _check_head_kernel(policy: PolicyConfig, device: torch.device) -> None:
    if policy.head_kernel == "torch":
        return
    if device.type != "cuda":
        raise UserError(f"policy.head_kernel={policy.head_kernel} needs a GPU: use torch")
    if importlib.util.find_spec("triton") is None:
        raise UserError(f"policy.head_kernel={policy.head_kernel} needs the package triton: install it, or use torch")


def _stages(policy: PolicyConfig, layers: int) -> list[list[str]]:
    """Megatron's list of the layers of each chunk, in the order of the model."""
    chunks = [["decoder"] * count for count in stage_layers(policy, layers)]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def build_chunks(
    architecture: Architecture, config: TransformerConfig, policy: PolicyConfig, runtime: Runtime
) -> list[torch.nn.Module]:
    """This rank's model chunks (one, or `virtual_stages` of an interleaved pipeline), without weights loaded.

    Chunks are GPTModel, or Float16Module around it in bf16; the head of the last stage is a `LanguageModelHead`.
    """
    _check_head_kernel(policy, runtime.device)
    a, spec = architecture, choose_layer_spec(policy, runtime.device)
    if spec == "te":
        transformer_engine.warn_without_deterministic_attention()
    chunks = []
    for chunk in range(policy.virtual_stages):
        vp_stage = chunk if policy.virtual_stages > 1 else None
        where = {} if vp_stage is None else dict(ignore_virtual=False, vp_stage=vp_stage)
        if vp_stage is not None:
            parallel_state.set_virtual_pipeline_model_parallel_rank(vp_stage)
        model = GPTModel(
            config,
            layer_spec(spec, config, vp_stage),
            vocab_size=padded_vocab_size(a.vocab_size, policy.tensor_parallel),
            max_sequence_length=a.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            position_embedding_type="rope",
            rotary_base=a.rope_base,
            rope_scaling=a.rope_scaling_factor is not None,
            rope_scaling_factor=a.rope_scaling_factor or 8.0,
            share_embeddings_and_output_weights=a.tied,
            vp_stage=vp_stage,
        )
        if model.post_process:
            LanguageModelHead.take_over(model.output_layer, a.vocab_size)
        if spec == "torch":
            model.rotary_pos_emb = TokenRotary(model.rotary_pos_emb)
        else:
            accumulate_in_float32(model)
        mark_tensor_parallel(model, a)
        model.to(runtime.device)
        chunks.append(Float16Module(config, model) if config.bf16 else model)
    return chunks


def mark_tensor_parallel(model: GPTModel, architecture: Architecture) -> None:
    """Set `tensor_model_parallel` on every parameter that tensor parallelism splits, as Megatron's own layers do.

    In the gradient norm, a parameter without the attribute counts only on the first tensor-parallel rank. Transformer
    Engine's grouped experts lack it since version 2.13 (with megatron-core 0.16).
    """
    layers = [layer.layer_number - 1 for layer in model.decoder.layers]
    for name, parameter in model.named_parameters():
        if map_parameter(architecture.family, name, layers, 0).rule.kind != "replicated":
            parameter.tensor_model_parallel = True


def accumulate_in_float32(model: GPTModel) -> None:
    """Let Transformer Engine's layers add weight gradients directly to the float32 buffers, not in bf16 first."""
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def packed_parameters(model: GPTModel, batch: PackedBatch) -> PackedSeqParams:
    """Packed-sequence parameters of a micro-batch for the layers of `model`."""
    lengths = dict(qkv_format="thd", max_seqlen_q=batch.max_seqlen, max_seqlen_kv=batch.max_seqlen)
    if not isinstance(model.rotary_pos_emb, TokenRotary):
        return PackedSeqParams(cu_seqlens_q=batch.cu_seqlens, cu_seqlens_kv=batch.cu_seqlens, **lengths)
    return TorchPackedSeqParams(
        bounds=batch.bounds,
        cu_seqlens=batch.cu_seqlens,
        positions=batch.positions,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        **lengths,
    )


def unwrap(module: torch.nn.Module) -> GPTModel:
    """The GPTModel inside data-parallel and precision wrappers."""
    while not isinstance(module, GPTModel):
        module = module.module
    return module


@dataclass
class HeadRequest:
    """What the head computes from the hidden states of one micro-batch, and, after the forward, the result."""

    batch: PackedBatch
    temperature: float
    chunk_tokens: int
    features: bool = False
    """Old-log-prob pass: also compute Φ."""
    prior_logprobs: Float[Tensor, "response_tokens"] | None = None
    """Old-log-prob pass: log-probs of the batch's `chosen` tokens from the rollout engine."""
    prior_tolerance: float = 0.0
    """Old-log-prob pass: as in `score_tokens`."""
    kernel: head.Kernel = "torch"
    """Old-log-prob pass: as in `score_tokens`."""
    with_gradient: bool = False
    """Update pass: differentiable log-probs and entropy."""
    timer: head.DeviceTimer | None = None
    """Old-log-prob pass: measures the time of Φ."""
    scores: head.TokenScores | None = None
    """Result of the old-log-prob pass; None before the forward and in the update pass."""


class LanguageModelHead(ColumnParallelLinear):
    """GPTModel's output layer, which returns [tokens, 1, 2] (log-prob, entropy) for a `HeadRequest` instead of logits.

    It is the module that megatron calls, so its data-parallel hooks run, and its parameters and checkpoint names are
    those of the layer it replaces. Without a request it returns logits.
    """

    request: HeadRequest | None
    vocab_size: int

    @classmethod
    def take_over(cls, layer: ColumnParallelLinear, vocab_size: int) -> None:
        """Convert an output layer that GPTModel has built to a LanguageModelHead; parameters and hooks are kept."""
        layer.__class__ = cls
        layer.request, layer.vocab_size = None, vocab_size

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Hidden states [tokens (over TP under sequence parallelism), 1, hidden] -> ([tokens, 1, 2], None)."""
        if self.request is None:
            return super().forward(input_, weight, runtime_gather_output)
        hidden = input_
        if self.sequence_parallel:
            # Backward reduce-scatters the partial gradients of the vocabulary shards.
            hidden = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        compute = self._update if self.request.with_gradient else self._score
        return compute(hidden.squeeze(1), self.weight if weight is None else weight).unsqueeze(1), None

    def _score(self, hidden: Tensor, weight: Tensor) -> Tensor:
        request, batch = self.request, self.request.batch
        context = parallel_state.get_context_parallel_world_size() > 1
        scores = head.score_tokens(
            hidden.index_select(0, batch.chosen),
            weight,
            batch.targets.index_select(0, batch.chosen),
            batch.row.index_select(0, batch.chosen),
            len(batch.sources),
            runs=batch.runs,
            features=request.features,
            timer=request.timer,
            prior_logprobs=request.prior_logprobs,
            prior_tolerance=request.prior_tolerance,
            kernel=request.kernel,
            reduce_group=parallel_state.get_tensor_and_context_parallel_group() if context else None,
            **self._shard(),
        )
        columns = (scores.logprobs, scores.entropy)
        all_tokens = [x.new_zeros(len(hidden)).index_copy_(0, batch.chosen, x) for x in columns]
        request.scores = replace(scores, logprobs=all_tokens[0], entropy=all_tokens[1])
        return torch.stack(all_tokens, 1)

    def _update(self, hidden: Tensor, weight: Tensor) -> Tensor:
        batch = self.request.batch
        # Only response tokens are multiplied with the vocabulary; the others get zeros and no gradient.
        values = torch.stack(
            head.token_logprobs(
                hidden.index_select(0, batch.chosen),
                weight,
                batch.targets.index_select(0, batch.chosen),
                with_entropy=True,
                hidden_gradient="partial" if self.sequence_parallel else "complete",
                # DistributedDataParallel gives every weight a main_grad; an unwrapped model has none.
                main_grad=getattr(weight, "main_grad", None),
                **self._shard(),
            ),
            1,
        )
        return values.new_zeros(len(hidden), 2).index_copy(0, batch.chosen, values)

    def _shard(self) -> dict[str, object]:
        rank = self.tp_group.rank()
        return dict(
            temperature=self.request.temperature,
            vocab_start=rank * self.output_size_per_partition,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            chunk_tokens=self.request.chunk_tokens,
        )
