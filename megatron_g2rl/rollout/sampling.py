"""Samples one token for each row of a batch, each row from its own random stream.

Each position of a row uses one uniform number, the output of a counter-based generator at (seed, position). There is no
generator object, so the result does not depend on which rows share a batch, on their order or on how many were sampled
before. The token is found by inverting the cumulative distribution at that number: one random number per token, where
Gumbel noise would need one per vocabulary entry for the same distribution.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _signed(value: int) -> int:
    """Reinterpret an unsigned 64-bit value as the signed integer that torch.int64 holds."""
    return value - (1 << 64) if value >= 1 << 63 else value


_MIX_A = _signed(0xBF58476D1CE4E5B9)
_MIX_B = _signed(0x94D049BB133111EB)


def _xor_shift(value: Int[Tensor, " rows"], bits: int) -> Int[Tensor, " rows"]:
    # torch shifts int64 arithmetically: the mask turns this into a logical shift of the unsigned word
    return value ^ ((value >> bits) & ((1 << (64 - bits)) - 1))


def uniform(seeds: Int[Tensor, " rows"], position: int) -> Float[Tensor, " rows"]:
    """Uniform 52-bit numbers in [0, 1) at one position of each row's stream (SplitMix64, Steele et al. 2014).

    Args:
        seeds: int64, one per row (`records.response_seed`).
        position: index of the token in its response, from 0.

    Returns:
        float64. With 52 bits, `u * total < total` also holds after rounding.
    """
    word = seeds + _signed((position + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
    word = _xor_shift(word, 30) * _MIX_A
    word = _xor_shift(word, 27) * _MIX_B
    word = _xor_shift(word, 31)
    return ((word >> 12) & ((1 << 52) - 1)).double() * 2.0**-52


def draw(
    logits: Float[Tensor, "rows vocab"], temperature: float, uniforms: Float[Tensor, " rows"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Sample from softmax(logits / temperature) by inverting its cumulative distribution.

    Args:
        logits: any float dtype.
        temperature: above 0.
        uniforms: float64 in [0, 1).

    Returns:
        Token ids (int64) and their log-probabilities under that distribution (nats, float32).
    """
    return invert(torch.log_softmax(logits.float() / temperature, dim=-1), uniforms)


def invert(
    logprobs: Float[Tensor, "rows vocab"], uniforms: Float[Tensor, " rows"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """`draw` from log-probabilities (float32)."""
    # over a large vocabulary, the error of a float32 cumulative sum exceeds the probability of most tokens
    cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
    # right=True picks the first entry ABOVE the threshold, which never belongs to a token of zero probability
    threshold = (uniforms * cumulative[:, -1]).unsqueeze(-1)
    tokens = torch.searchsorted(cumulative, threshold, right=True)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1)
