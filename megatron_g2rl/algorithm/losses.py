"""The losses of the update pass and of the SFT warm-up (docs/method.md, section 4).

Each returns its partial sum of the loss of the complete optimizer update, and metrics that add up in the same way: the
trainer sums over micro-batches and ranks, without any further division.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_g2rl.algorithm.aggregation import UpdateTotals, aggregate
from megatron_g2rl.algorithm.kl import kl_penalty
from megatron_g2rl.algorithm.ratio import clamp_log_ratio, sequence_log_ratio, zero_outside


def policy_loss(
    logprobs: Float[Tensor, "responses tokens"],
    old_logprobs: Float[Tensor, "responses tokens"],
    advantages: Float[Tensor, "responses"] | Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = 3.0,
    ratio: Literal["token", "sequence"] = "token",
    aggregation: str = "token_mean",
    importance_weights: Float[Tensor, "responses tokens"] | None = None,
    totals: UpdateTotals | None = None,
    response_tokens: Int[Tensor, "responses"] | None = None,
    cp_group: ProcessGroup | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Clipped policy-gradient loss, -min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A), at most dual_clip |A| for A < 0.

    Entries where the mask is False are ignored: even NaN there changes neither value nor gradient.

    Args:
        logprobs: log-probabilities under the current policy (nats); the only input that receives a gradient.
        old_logprobs: log-probabilities under the old policy, which generated the responses (nats).
        advantages: one for each response or for each token.
        mask: True on the local response tokens.
        clip_low: the ratio is clipped below 1 - clip_low.
        clip_high: the ratio is clipped above 1 + clip_high.
        dual_clip: bound on the ratio where the advantage is negative; None: no bound.
        ratio: `token`, or `sequence`: every token gets its response's length-normalized ratio (GSPO).
        aggregation: a name in `AGGREGATIONS`.
        importance_weights: factor on each token's loss (trainer / rollout engine); None: 1.
        totals: size of the complete update; None: this call is the complete update.
        response_tokens: full length of each response, required where its tokens are distributed over ranks.
        cp_group: context-parallel group over which the tokens are distributed; used by `ratio="sequence"` only.

    Returns:
        The loss, and detached token means `ratio_mean`, `approx_kl` (k3 of the old policy || the current one, nats),
        `clip_fraction_low` (A < 0, ρ below the range), `clip_fraction_high` (A > 0, ρ above it) and
        `dual_clip_fraction`. Loss and metrics are partial sums to be added over micro-batches and ranks.

    Raises:
        ValueError: shapes disagree, an option is unknown or contradicts another.

    Source: docs/method.md, section 4, equations 3-4; dual clip: arXiv 1912.09729.
    """
    _check(logprobs, mask, old_logprobs=old_logprobs, importance_weights=importance_weights)
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        raise ValueError(
            f"advantages {list(advantages.shape)} must be one for each response or for each token of {list(mask.shape)}"
        )
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1 (or None to disable it), got {dual_clip}")
    mask = mask.bool()
    log_ratio = zero_outside(logprobs, mask) - zero_outside(old_logprobs.detach(), mask)
    rho = _ratio(log_ratio, mask, ratio, response_tokens, cp_group)
    per_response = advantages.detach() if advantages.ndim == 2 else advantages.detach()[:, None].expand_as(mask)
    advantage = zero_outside(per_response, mask)

    losses = torch.maximum(-rho * advantage, -rho.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is not None:
        losses = torch.where(advantage < 0, torch.minimum(losses, -dual_clip * advantage), losses)
    if importance_weights is not None:
        losses = losses * zero_outside(importance_weights.detach(), mask)
    loss = aggregate(losses, mask, aggregation, totals=totals, response_tokens=response_tokens)

    observed, negative, positive = rho.detach(), advantage < 0, advantage > 0
    metrics = {
        "ratio_mean": observed,
        "approx_kl": kl_penalty(torch.zeros_like(log_ratio), log_ratio.detach(), "k3"),
        "clip_fraction_low": negative & (observed < 1 - clip_low),
        "clip_fraction_high": positive & (observed > 1 + clip_high),
        "dual_clip_fraction": negative & (observed > (torch.inf if dual_clip is None else dual_clip)),
    }
    return loss, {
        name: _token_mean(value.to(rho.dtype), mask, totals, response_tokens) for name, value in metrics.items()
    }


def training_loss(
    logprobs: Float[Tensor, "responses tokens"],
    old_logprobs: Float[Tensor, "responses tokens"],
    advantages: Float[Tensor, "responses"] | Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    *,
    entropy: Float[Tensor, "responses tokens"] | None = None,
    reference_logprobs: Float[Tensor, "responses tokens"] | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coefficient: float = 0.0,
    aggregation: str = "token_mean",
    totals: UpdateTotals | None = None,
    response_tokens: Int[Tensor, "responses"] | None = None,
    **policy_options: Any,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Policy loss + kl_coefficient * KL to the reference - entropy_coefficient * entropy, with the same aggregation.

    Args:
        logprobs: as in `policy_loss`.
        old_logprobs: as in `policy_loss`.
        advantages: as in `policy_loss`.
        mask: as in `policy_loss`.
        entropy: full-vocabulary entropy of each token (nats), with gradient where it is part of the loss.
        reference_logprobs: log-probabilities under the frozen reference (nats).
        kl_coefficient: weight of the KL term; 0 leaves it out of the loss.
        kl_estimator: a name in `KL_ESTIMATORS`.
        entropy_coefficient: weight of the entropy bonus; 0 leaves it out of the loss.
        aggregation: as in `policy_loss`.
        totals: as in `policy_loss`.
        response_tokens: as in `policy_loss`.
        **policy_options: the other options of `policy_loss`.

    Returns:
        The loss, and the metrics of `policy_loss` plus `policy_loss` (aggregated as in the loss) and, if their inputs
        are given, `kl` and `entropy` (token means, nats). All are partial sums, to be added over micro-batches and
        ranks.

    Raises:
        ValueError: as in `policy_loss`, or a coefficient is set but its tensor is missing.

    Source: docs/method.md, section 4.
    """
    if kl_coefficient and reference_logprobs is None:
        raise ValueError(f"kl_coefficient is {kl_coefficient} but there are no reference_logprobs")
    if entropy_coefficient and entropy is None:
        raise ValueError(f"entropy_coefficient is {entropy_coefficient} but there is no entropy")
    _check(logprobs, mask, entropy=entropy, reference_logprobs=reference_logprobs)
    mask = mask.bool()
    update = {"totals": totals, "response_tokens": response_tokens}
    loss, metrics = policy_loss(
        logprobs, old_logprobs, advantages, mask, aggregation=aggregation, **update, **policy_options
    )
    metrics["policy_loss"] = loss.detach()
    if reference_logprobs is not None:
        kl = kl_penalty(zero_outside(logprobs, mask), zero_outside(reference_logprobs.detach(), mask), kl_estimator)
        metrics["kl"] = _token_mean(kl, mask, totals, response_tokens)
        if kl_coefficient:
            loss = loss + kl_coefficient * aggregate(kl, mask, aggregation, **update)
    if entropy is not None:
        entropy = zero_outside(entropy, mask)
        metrics["entropy"] = _token_mean(entropy, mask, totals, response_tokens)
        if entropy_coefficient:
            loss = loss - entropy_coefficient * aggregate(entropy, mask, aggregation, **update)
    return loss, metrics


def supervised_loss(
    logprobs: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    *,
    totals: UpdateTotals | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Mean negative log-likelihood of the masked tokens, in nats per token (the loss of the SFT warm-up).

    Args:
        logprobs: log-probabilities of the demonstrations' tokens, with gradient.
        mask: True on the tokens to learn.
        totals: size of the complete update; None: this call is the complete update.

    Returns:
        The loss and `{"negative_log_likelihood": loss}`, partial sums to be added over micro-batches and ranks.

    Raises:
        ValueError: shapes disagree.
    """
    _check(logprobs, mask)
    loss = aggregate(-zero_outside(logprobs, mask.bool()), mask, "token_mean", totals=totals)
    return loss, {"negative_log_likelihood": loss.detach()}


def _ratio(
    log_ratio: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    ratio: str,
    response_tokens: Int[Tensor, "responses"] | None,
    cp_group: ProcessGroup | None,
) -> Float[Tensor, "responses tokens"]:
    if ratio == "token":
        return clamp_log_ratio(log_ratio).exp()
    if ratio != "sequence":
        raise ValueError(f"unknown ratio {ratio!r}: choose token or sequence")
    if response_tokens is None and cp_group is not None:
        raise ValueError("ratio='sequence' over ranks needs response_tokens: the full length of each response")
    lengths = mask.sum(dim=1) if response_tokens is None else response_tokens
    return clamp_log_ratio(sequence_log_ratio(log_ratio, lengths, cp_group)).exp().expand_as(mask)


def _token_mean(
    values: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    totals: UpdateTotals | None,
    response_tokens: Int[Tensor, "responses"] | None,
) -> Float[Tensor, ""]:
    return aggregate(values.detach(), mask, "token_mean", totals=totals, response_tokens=response_tokens)


def _check(logprobs: Tensor, mask: Tensor, **others: Tensor | None) -> None:
    """Refuse tensors that are not all [responses, tokens] of one shape."""
    tensors = {
        "logprobs": logprobs,
        "mask": mask,
        **{name: value for name, value in others.items() if value is not None},
    }
    if logprobs.ndim != 2 or any(value.shape != logprobs.shape for value in tensors.values()):
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items())
        raise ValueError(f"expected tensors of the same shape [responses, tokens], got {shapes}")
