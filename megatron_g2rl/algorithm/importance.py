"""Trainer against sampler: truncated importance weights, and how far apart the two are.

They run the same weights, but round differently, and the ratio of their probabilities is not one.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_g2rl.algorithm.aggregation import Totals, aggregate
from megatron_g2rl.algorithm.kl import kl_penalty
from megatron_g2rl.algorithm.ratio import bounded, keep


def truncated_importance_weights(
    old_logprobs: Float[Tensor, "responses tokens"],
    rollout_logprobs: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    cap: float,
) -> Float[Tensor, "responses tokens"]:
    """Weight min(trainer / sampler, cap) of each token, without gradient; 1 where the mask is False.

    Args:
        old_logprobs: log-probabilities by the trainer, of the weights that sampled.
        rollout_logprobs: log-probabilities that came with the responses.
        mask: True on response tokens.
        cap: largest weight; the bias it brings buys bounded variance.

    Source: truncated importance sampling (Ionides 2008), between sampler and trainer as in TRL and verl.
    """
    return bounded(_difference(old_logprobs, rollout_logprobs, mask)).exp().clamp(max=cap)


def rollout_mismatch(
    old_logprobs: Float[Tensor, "responses tokens"],
    rollout_logprobs: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    cap: float | None = None,
    *,
    totals: Totals | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """How far the sampler's log-probabilities are from the trainer's, over response tokens.

    Args:
        old_logprobs: log-probabilities by the trainer, of the weights that sampled.
        rollout_logprobs: log-probabilities that came with the responses.
        mask: True on response tokens.
        cap: cap of the importance weights; None: no weight is truncated.
        totals: what all ranks hold; None: this call is everything.

    Returns:
        `logprob_difference_mean` and `logprob_difference_max` (nats, absolute), `kl` (k3 of sampler || trainer, nats)
        and `truncated_fraction` (tokens whose weight is above the cap). The maximum is over this call; the others are
        addends that sum over ranks.
    """
    difference = _difference(old_logprobs, rollout_logprobs, mask)
    truncated = torch.zeros_like(difference) if cap is None else (bounded(difference).exp() > cap).to(difference.dtype)

    def mean(values: Tensor) -> Tensor:
        return aggregate(values, mask, "token_mean", totals=totals)

    return {
        "logprob_difference_mean": mean(difference.abs()),
        "logprob_difference_max": difference.abs().max() if difference.numel() else difference.sum(),
        "kl": mean(kl_penalty(torch.zeros_like(difference), difference, "k3")),
        "truncated_fraction": mean(truncated),
    }


def _difference(
    old_logprobs: Float[Tensor, "responses tokens"],
    rollout_logprobs: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
) -> Float[Tensor, "responses tokens"]:
    """log trainer - log sampler on response tokens, 0 elsewhere, without gradient."""
    if not old_logprobs.shape == rollout_logprobs.shape == mask.shape:
        raise ValueError(
            "log-probabilities of trainer and sampler and the mask must have one shape, got "
            f"{list(old_logprobs.shape)}, {list(rollout_logprobs.shape)} and {list(mask.shape)}"
        )
    return (keep(old_logprobs, mask.bool()) - keep(rollout_logprobs, mask.bool())).detach()
