"""Mismatch between trainer and rollout engine: importance weights, rejection, and metrics of the difference.

Both use the same weights but round differently, so the ratio of their probabilities is not exactly one.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from megatron_g2rl.algorithm.aggregation import UpdateTotals, aggregate
from megatron_g2rl.algorithm.kl import kl_penalty
from megatron_g2rl.algorithm.ratio import clamp_log_ratio, zero_outside


def importance_weights(
    old_logprobs: Float[Tensor, "responses tokens"],
    rollout_logprobs: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    *,
    cap: float | None,
    level: Literal["token", "sequence"] = "token",
    bounds: tuple[float, float] | None = None,
    cp_group: ProcessGroup | None = None,
) -> Float[Tensor, "responses tokens"]:
    """Factor on the policy term of each token, without gradient: the importance weight, or 0 in rejected responses.

    Args:
        old_logprobs: the trainer's log-probabilities under the old policy, which generated the responses (nats).
        rollout_logprobs: the rollout engine's log-probabilities of the same tokens (nats).
        mask: True on the local response tokens.
        cap: largest weight; None: the weight is 1.
        level: `token`: min(ratio of the token, cap); `sequence`: min(ratio of the response, cap), for all its tokens.
        bounds: responses whose ratio is below the first or above the second are rejected; None: none.
        cp_group: context-parallel group over which the tokens are distributed; every rank of it has to call this.

    Source: docs/method.md, section 4. `sequence` is TRL's `sequence_truncate`, rejection verl's `rollout_rs=sequence`.
    """
    weights = torch.ones_like(zero_outside(old_logprobs, mask.bool()))
    if cap is not None and level == "token":
        weights = truncated_importance_weights(old_logprobs, rollout_logprobs, mask, cap)
    if (cap is None or level == "token") and bounds is None:
        return weights
    ratio = sequence_ratio(old_logprobs, rollout_logprobs, mask, cp_group)
    if cap is not None and level == "sequence":
        weights = ratio.clamp(max=cap).expand_as(mask)
    if bounds is not None:
        weights = weights.where(~is_rejected(ratio, bounds), 0.0)
    return weights


def sequence_ratio(
    old_logprobs: Float[Tensor, "responses tokens"],
    rollout_logprobs: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    cp_group: ProcessGroup | None = None,
) -> Float[Tensor, "responses 1"]:
    """Probability of each response under the trainer over that under the rollout engine, without gradient.

    Args:
        old_logprobs, rollout_logprobs, mask, cp_group: as in `importance_weights`.
    """
    log_ratio = _difference(old_logprobs, rollout_logprobs, mask).sum(dim=1, keepdim=True)
    if cp_group is not None:
        all_reduce(log_ratio, ReduceOp.SUM, group=cp_group)
    return clamp_log_ratio(log_ratio).exp()


def is_rejected(ratio: Float[Tensor, "*shape"], bounds: tuple[float, float]) -> Bool[Tensor, "*shape"]:
    """Whether ratios of responses are outside of the bounds; False for NaN, which reaches the loss."""
    return (ratio < bounds[0]) | (ratio > bounds[1])


def truncated_importance_weights(
    old_logprobs: Float[Tensor, "responses tokens"],
    rollout_logprobs: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    cap: float,
) -> Float[Tensor, "responses tokens"]:
    """Weight min(trainer / rollout engine, cap) of each token, without gradient; 1 where the mask is False.

    Args:
        old_logprobs: the trainer's log-probabilities under the old policy, which generated the responses (nats).
        rollout_logprobs: the rollout engine's log-probabilities of the same tokens (nats).
        mask: True on response tokens.
        cap: largest weight; truncation trades some bias for bounded variance.

    Source: truncated importance sampling (Ionides 2008), applied to rollout engine and trainer as in TRL and verl.
    """
    return clamp_log_ratio(_difference(old_logprobs, rollout_logprobs, mask)).exp().clamp(max=cap)


def rollout_mismatch(
    old_logprobs: Float[Tensor, "responses tokens"],
    rollout_logprobs: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    cap: float | None = None,
    *,
    totals: UpdateTotals | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Metrics of the difference between the rollout engine's and the trainer's log-probabilities of response tokens.

    Args:
        old_logprobs: the trainer's log-probabilities under the old policy, which generated the responses (nats).
        rollout_logprobs: the rollout engine's log-probabilities of the same tokens (nats).
        mask: True on response tokens.
        cap: cap of the importance weights; None: no weight is truncated.
        totals: sizes over all ranks; None: this call covers everything.

    Returns:
        `logprob_difference_mean` and `logprob_difference_max` (nats, absolute), `kl` (k3 of rollout engine || trainer,
        nats) and `truncated_fraction` (of tokens, whose weight is above the cap). The maximum is over this call;
        the others are partial sums to be added over ranks.
    """
    difference = _difference(old_logprobs, rollout_logprobs, mask)
    truncated = (
        torch.zeros_like(difference) if cap is None else (clamp_log_ratio(difference).exp() > cap).to(difference.dtype)
    )

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
    """log p(trainer) - log p(rollout engine) on response tokens, 0 elsewhere, without gradient."""
    if not old_logprobs.shape == rollout_logprobs.shape == mask.shape:
        raise ValueError(
            "the trainer's log-probs, the rollout engine's log-probs and the mask must have the same shape, got "
            f"{list(old_logprobs.shape)}, {list(rollout_logprobs.shape)} and {list(mask.shape)}"
        )
    return (zero_outside(old_logprobs, mask.bool()) - zero_outside(rollout_logprobs, mask.bool())).detach()
