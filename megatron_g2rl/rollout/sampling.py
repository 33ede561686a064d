"""Samples one token for each row of a batch, each row from its own random stream.

Each position of a row uses one uniform number, the output of a counter-based generator at (seed, position). There is no
generator object, so the result does not depend on which rows share a batch, on their order or on how many were sampled
before. The token is found by inverting the cumulative distribution at that number: one random number per token, where
Gumbel noise would need one per vocabulary entry for the same distribution.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_g2rl.rollout.engine import Sampling


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


def distribution(logits: Float[Tensor, "rows vocab"], sampling: Sampling) -> Float[Tensor, "rows vocab"]:
    """Log-probabilities (nats, float32) that tokens are sampled from; -inf for tokens that are left out.

    The limits apply in vLLM's order: temperature, `min_p`, `top_k`, then `top_p` of what these leave. With temperature
    0, where nothing is sampled, these are the log-probabilities at temperature 1, as in vLLM.

    Args:
        logits: any float dtype.
        sampling: temperature and limits.
    """
    table = torch.log_softmax(logits.float() / (sampling.temperature or 1.0), dim=-1)
    if not sampling.temperature or (sampling.top_p == 1.0 and not sampling.top_k and not sampling.min_p):
        return table
    if sampling.min_p:
        lowest = table.amax(dim=-1, keepdim=True) + math.log(sampling.min_p)
        table = table.masked_fill(table < lowest, -math.inf)
    if 0 < sampling.top_k < table.shape[-1]:
        lowest = table.topk(sampling.top_k, dim=-1).values[:, -1:]
        table = table.masked_fill(table < lowest, -math.inf)
    if sampling.top_p < 1.0:
        table = _nucleus(torch.log_softmax(table, dim=-1), sampling.top_p)
    return torch.log_softmax(table, dim=-1)


def _nucleus(logprobs: Float[Tensor, "rows vocab"], top_p: float) -> Float[Tensor, "rows vocab"]:
    """Leave out every token whose more probable tokens already have a total probability of `top_p`."""
    ordered, tokens = logprobs.sort(dim=-1, descending=True)
    before = ordered.exp().double().cumsum(dim=-1) - ordered.exp()
    return logprobs.masked_fill((before >= top_p).gather(-1, tokens.argsort(dim=-1)), -math.inf)


def choose(
    table: Float[Tensor, "rows vocab"], sampling: Sampling, uniforms: Float[Tensor, " rows"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The next token of each row, and its log-probability: the most probable one at temperature 0, else a sample.

    Args:
        table: of `distribution`.
        sampling: its temperature.
        uniforms: float64 in [0, 1).
    """
    if sampling.temperature:
        return invert(table, uniforms)
    best = table.max(dim=-1)
    return best.indices, best.values


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
