"""The model, its layout on Megatron and its optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_g2rl.config.sections.base import (
    FamilyName,
    Name,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)


class ModelConfig(Section):
    """The model to train."""

    path: Name
    """Folder (or Hub name) of a Hugging Face checkpoint; `g2rl warm-start` creates one for a built-in task."""
    family: FamilyName | None = None
    """Family of a model whose `model_type` is not registered: a registered family with the same layers, or a table of
    your own (docs/extending.md). null: chosen by the `model_type`."""


class PolicyConfig(Section):
    """Megatron: parallel layout, precision and layer implementation."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if available."""
    layer_spec: Literal["auto", "te", "torch"] = "auto"
    """`te`: Transformer Engine; `torch`: RMSNorm and scaled_dot_product_attention; `auto`: te if it can run."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and activations; master weights, gradients and reductions are always fp32."""
    tensor_parallel: Positive = 1
    """Tensor-parallel ranks."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence over the tensor-parallel ranks."""
    pipeline_parallel: Positive = 1
    """Pipeline stages."""
    virtual_stages: Positive = 1
    """Model chunks per pipeline stage (above 1: interleaved schedule)."""
    pipeline_layout: Annotated[str, Field(pattern=r"^\d{1,4}(\*\d{1,4})?(,\d{1,4}(\*\d{1,4})?)*$")] | None = None
    """Layers of each stage in model order, such as `12*7,10` (seven stages of 12 and one of 10); with virtual stages,
    layers of each chunk. null: an equal split."""
    context_parallel: Positive = 1
    """Context-parallel ranks, over which each sequence is split."""
    expert_parallel: Positive = 1
    """Expert-parallel ranks, over which the experts of a mixture-of-experts model are split."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over the data-parallel ranks."""
    offload_optimizer: bool = False
    """Keep the Adam state in host memory between updates: frees GPU memory for rollouts at the cost of two copies per
    step."""
    overlap_communication: bool = False
    """Overlap gradient reduction (and parameter gathering) with computation."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, core attention, or entire layers."""
    head_memory_mb: Positive = 256
    """Memory in MiB for one chunk of vocabulary logits and the tables derived from them; it sets the chunk size of the
    LM head in tokens."""
    head_kernel: Literal["torch", "triton", "triton_deterministic"] = "torch"
    """How a GPU computes Φ (exploration.prior_tolerance): `torch`: exact sweep of cuBLAS products and compiled
    elementwise functions; `triton`: one kernel that never writes logits, not yet run on a GPU; `triton_deterministic`:
    the same without float atomics."""


class OptimizerConfig(Section):
    """Adam and its learning-rate schedule."""

    learning_rate: PositiveFloat = 5e-7
    """Peak learning rate."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Learning rate at the end of a decaying schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning-rate decay over all updates of the run."""
    warmup_updates: NonNegative = 0
    """Number of updates of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """First-moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Second-moment decay."""
    epsilon: PositiveFloat = 1e-8
    """Adam's epsilon."""
    gradient_clip: PositiveFloat = 1.0
    """Bound on the global gradient norm."""
