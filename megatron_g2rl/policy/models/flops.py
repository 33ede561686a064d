"""Counts the floating-point operations that a model needs, from its architecture.

The count includes the matrix products (two operations per multiply-add) of the layers and of the LM head, which is
needed at response tokens only, and causal attention: a token attends to itself and to those before it. It excludes
elementwise operations, the embedding, padding, recomputed activations, and Φ. A backward pass needs twice as many
operations as its forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_g2rl.policy.models.architecture import Architecture
from megatron_g2rl.policy.packing import TokenSequence

UPDATE = 3
"""Operations of a forward and a backward pass, in forward passes."""

PEAK_TFLOPS = {
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "GH200": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}
"""Peak of dense products of 16-bit numbers, in 10^12 operations per second, from NVIDIA's data sheets; by a part of the
name that CUDA reports. Of several names that match, the longest counts."""


def layer_flops_per_token(architecture: Architecture) -> int:
    """Operations of the matrix products of all layers for one token in a forward pass, without attention itself."""
    a = architecture
    width, narrow = a.heads * a.head_dim, a.key_value_groups * a.head_dim
    attention = a.hidden * (width + 2 * narrow) + width * a.hidden
    if a.experts:
        mlp = a.hidden * a.experts + 3 * a.hidden * a.expert_ffn_hidden * a.experts_per_token
    else:
        mlp = 3 * a.hidden * a.ffn_hidden
    return 2 * a.layers * (attention + mlp)


def sequence_flops(architecture: Architecture, sequence: TokenSequence, *, lm_head: bool = True) -> int:
    """Operations of a forward pass over one sequence, with or without those of the LM head."""
    a, n = architecture, sequence.length
    attended = n * (n + 1) // 2  # pairs of tokens: queries times keys, then probabilities times values
    attention = 4 * a.layers * a.heads * a.head_dim * attended
    head = 2 * a.hidden * a.vocab_size * len(sequence.response) if lm_head else 0
    return n * layer_flops_per_token(a) + attention + head


def forward_flops(architecture: Architecture, sequences: Iterable[TokenSequence], *, lm_head: bool = True) -> int:
    """Operations of a forward pass over several sequences, with or without those of the LM head."""
    return sum(sequence_flops(architecture, sequence, lm_head=lm_head) for sequence in sequences)


def peak_tflops(device_name: str) -> float | None:
    """Peak of the device for products of 16-bit numbers (`PEAK_TFLOPS`); None: it is not known."""
    words = device_name.replace("-", " ").split()
    spaced = f" {' '.join(words)} "
    known = [name for name in PEAK_TFLOPS if f" {name} " in spaced]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def throughput(flops: int, seconds: float, ranks: int, device: torch.device, precision: str) -> dict[str, float]:
    """Operations per second of the training passes, per rank, as metrics (`tracking/table.py`).

    Args:
        flops: operations of the passes on all ranks.
        seconds: their duration.
        ranks: number of ranks.
        device: this rank's device; its peak gives the model FLOPs utilization, in 16 bits and if it is known.
        precision: `policy.precision`.
    """
    if not seconds:
        return {}
    tflops = flops / seconds / ranks / 1e12
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" and precision != "fp32" else None
    return {"throughput/model_tflops_per_s": tflops} | ({"throughput/mfu": tflops / peak} if peak else {})
