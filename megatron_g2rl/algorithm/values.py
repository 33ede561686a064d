"""Advantages from a critic's values, and the critic's loss (docs/method.md, section 4).

Rows are responses, padded at the end; the value of a token is that of the state in which it is sampled: the prompt and
the tokens before it.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_g2rl.algorithm.aggregation import UpdateTotals, aggregate
from megatron_g2rl.algorithm.ratio import zero_outside


def generalized_advantages(
    rewards: Float[Tensor, "responses tokens"],
    values: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
) -> Float[Tensor, "responses tokens"]:
    """Generalized advantage estimates: A_t = δ_t + γ λ A_{t+1}, with δ_t = r_t + γ V_{t+1} - V_t.

    The end of a response is terminal, also if it was truncated: its value and its advantage are 0. A_t + V_t is the
    target of V_t.

    Args:
        rewards: of each token.
        values: of the state before each token.
        mask: True on response tokens, which are the first ones of each row; other entries are ignored.
        gamma: discount γ.
        gae_lambda: λ: 0 for one-step estimates, 1 for the complete return.

    Returns:
        Advantages in float64, without gradient; 0 where the mask is False.

    Source: arXiv 1506.02438, equation 16.
    """
    rewards, values = (torch.where(mask, x.detach().double(), 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(values)
    following = advantages.new_zeros(len(advantages))
    following_value = following
    for t in reversed(range(mask.shape[1])):
        difference = rewards[:, t] + gamma * following_value - values[:, t]
        following = torch.where(mask[:, t], difference + gamma * gae_lambda * following, 0.0)
        following_value = values[:, t]
        advantages[:, t] = following
    return advantages


def whiten(
    advantages: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    epsilon: float = 1e-6,
) -> Float[Tensor, "responses tokens"]:
    """(advantage - mean) / (standard deviation + epsilon) over all tokens of the mask; other entries are 0.

    Args:
        advantages: of each token.
        mask: True on the tokens to normalize.
        epsilon: added to the standard deviation (unbiased); that of fewer than two tokens is 0.
    """
    chosen = advantages[mask]
    if not len(chosen):
        return torch.zeros_like(advantages)
    centered = advantages - chosen.mean()
    std = (centered[mask].square().sum() / max(len(chosen) - 1, 1)).sqrt()
    return torch.where(mask, centered / (std + epsilon), 0.0)


def value_loss(
    values: Float[Tensor, "responses tokens"],
    old_values: Float[Tensor, "responses tokens"],
    returns: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    clip: float | None = None,
    *,
    totals: UpdateTotals | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Half the squared error of the values, mean over tokens; with `clip` the larger of two errors.

    The second one is that of values at most `clip` away from the old ones, so that a value gains nothing from moving
    farther in one step.

    Args:
        values: of the current critic; the only input that receives a gradient.
        old_values: of the critic before the updates of the step.
        returns: targets.
        mask: True on the local response tokens; other entries are never read.
        clip: largest change from the old values; None: no clipping.
        totals: size of the complete update; None: this call is the complete update.

    Returns:
        The loss, and detached `clip_fraction`: tokens whose error is that of the clipped value, which has no gradient.
        Both are partial sums, to be added over micro-batches and ranks.

    Source: arXiv 1707.06347 as implemented in OpenAI's baselines; verl's value loss.
    """
    values = zero_outside(values, mask)
    old_values, returns = (zero_outside(x.detach(), mask) for x in (old_values, returns))
    losses = (values - returns).square()
    clipped = torch.zeros_like(mask)
    if clip is not None:
        other = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
        clipped = other > losses
        losses = torch.maximum(losses, other)
    fraction = aggregate(clipped.to(losses.dtype), mask, "token_mean", totals=totals)
    return aggregate(losses, mask, "token_mean", totals=totals) / 2, {"clip_fraction": fraction}


def explained_variance(values: Float[Tensor, "_tokens"], returns: Float[Tensor, "_tokens"]) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for a constant; NaN for constant returns."""
    values, returns = values.double(), returns.double()
    variance = float(returns.var(correction=0))
    return 1 - float((returns - values).var(correction=0)) / variance if variance else math.nan
