"""How responses are generated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_g2rl.config.sections.base import EngineName, Fraction, Positive, PositiveFloat, Section


class RolloutConfig(Section):
    """How responses are generated."""

    engine: EngineName = "vllm"
    """`vllm`: vLLM inside the training ranks; `transformers`: lightweight, for small models on CPU; or an
    engine of your own (docs/extending.md)."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; log-probs in training use the same temperature."""
    max_response_tokens: Positive = 8192
    """A response is truncated after this many tokens."""
    stop: tuple[Annotated[str, Field(min_length=1, max_length=200)], ...] = ()
    """Stop strings in addition to the end of turn of the chat template and the end-of-sequence tokens; they stay
    in the response."""
    incomplete_responses: Literal["wrong", "scored"] = "wrong"
    """Treatment of responses that are truncated or never end their thinking: `wrong`: never correct, and passed to
    reward functions as empty unless they accept `finish_reason` or `tokens`; `scored`: like any other response."""
    tensor_parallel: Positive = 1
    """Tensor-parallel ranks of one vLLM engine."""
    gpu_memory_fraction: Fraction = 0.5
    """Fraction of GPU memory that vLLM may use while it is awake (CUDA only)."""
    kv_cache_mb: Positive = 512
    """KV cache of one vLLM engine in MiB (CPU only)."""
    enforce_eager: bool = True
    """Run vLLM without CUDA graphs and compilation: faster startup, slower generation."""
