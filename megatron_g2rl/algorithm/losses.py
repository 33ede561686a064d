"""The losses of the update pass and of the warm start (docs/method.md, section 4).

Each returns its addend to the loss of the whole optimizer update, and metrics that add up in the same way: the trainer
sums over micro-batches and ranks and divides by nothing.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_g2rl.algorithm.aggregation import Totals, aggregate
from megatron_g2rl.algorithm.kl import kl_penalty
from megatron_g2rl.algorithm.ratio import bounded, keep, sequence_log_ratio


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
    totals: Totals | None = None,
    response_tokens: Int[Tensor, "responses"] | None = None,
    group: ProcessGroup | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Clipped policy-gradient loss, -min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A), at most dual_clip |A| for A < 0.

    What stands where the mask is False is never read: NaN there changes neither value nor gradient.

    Args:
        logprobs: log-probabilities under the policy that is trained (nats); the gradient flows through them only.
        old_logprobs: the same under the policy that sampled.
        advantages: one for each response or for each token.
        mask: True on the local response tokens.
        clip_low: the ratio is clipped below 1 - clip_low.
        clip_high: the ratio is clipped above 1 + clip_high.
        dual_clip: bound on the ratio where the advantage is negative; None: none.
        ratio: `token`, or `sequence`: the length-normalised ratio of the response for each of its tokens (GSPO).
        aggregation: a name in `AGGREGATIONS`.
        importance_weights: factor on each token's loss (trainer / sampler); None: 1.
        totals: what the whole update holds; None: this call is the whole update.
        response_tokens: full length of each response, needed where its tokens are spread over ranks.
        group: ranks that share the tokens of these responses (context parallelism); read by `ratio="sequence"` only.

    Returns:
        The loss, and detached token means `ratio_mean`, `approx_kl` (k3 of the old policy || the new one, nats),
        `clip_fraction_low` (A < 0, ρ under the range), `clip_fraction_high` (A > 0, ρ over it) and
        `dual_clip_fraction`. Loss and metrics are addends: they sum over micro-batches and ranks.

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
        raise ValueError(f"dual_clip must be above 1 (or None for none), got {dual_clip}")
    mask = mask.bool()
    log_ratio = keep(logprobs, mask) - keep(old_logprobs.detach(), mask)
    rho = _ratio(log_ratio, mask, ratio, response_tokens, group)
    per_response = advantages.detach() if advantages.ndim == 2 else advantages.detach()[:, None].expand_as(mask)
    advantage = keep(per_response, mask)

    losses = torch.maximum(-rho * advantage, -rho.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip is not None:
        losses = torch.where(advantage < 0, torch.minimum(losses, -dual_clip * advantage), losses)
    if importance_weights is not None:
        losses = losses * keep(importance_weights.detach(), mask)
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
    totals: Totals | None = None,
    response_tokens: Int[Tensor, "responses"] | None = None,
    **policy_options: Any,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Policy loss + kl_coefficient * KL to the reference - entropy_coefficient * entropy, all three aggregated alike.

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
        The loss, and the metrics of `policy_loss` with `policy_loss` (aggregated as in the loss) and, where they were
        given, `kl` and `entropy` (token means, nats). All are addends that sum over micro-batches and ranks.

    Raises:
        ValueError: as in `policy_loss`, or a coefficient is set and its tensor is missing.

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
        kl = kl_penalty(keep(logprobs, mask), keep(reference_logprobs.detach(), mask), kl_estimator)
        metrics["kl"] = _token_mean(kl, mask, totals, response_tokens)
        if kl_coefficient:
            loss = loss + kl_coefficient * aggregate(kl, mask, aggregation, **update)
    if entropy is not None:
        entropy = keep(entropy, mask)
        metrics["entropy"] = _token_mean(entropy, mask, totals, response_tokens)
        if entropy_coefficient:
            loss = loss - entropy_coefficient * aggregate(entropy, mask, aggregation, **update)
    return loss, metrics


def supervised_loss(
    logprobs: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    *,
    totals: Totals | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Mean negative log-likelihood of the marked tokens, in nats per token (the warm start's loss).

    Args:
        logprobs: log-probabilities of the demonstrations' tokens, with gradient.
        mask: True on the tokens to learn.
        totals: what the whole update holds; None: this call is the whole update.

    Returns:
        The loss and `{"negative_log_likelihood": loss}`, addends that sum over micro-batches and ranks.

    Raises:
        ValueError: shapes disagree.
    """
    _check(logprobs, mask)
    loss = aggregate(-keep(logprobs, mask.bool()), mask, "token_mean", totals=totals)
    return loss, {"negative_log_likelihood": loss.detach()}


def _ratio(
    log_ratio: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    ratio: str,
    response_tokens: Int[Tensor, "responses"] | None,
    group: ProcessGroup | None,
) -> Float[Tensor, "responses tokens"]:
    if ratio == "token":
        return bounded(log_ratio).exp()
    if ratio != "sequence":
        raise ValueError(f"unknown ratio {ratio!r}: choose token or sequence")
    if response_tokens is None and group is not None:
        raise ValueError("a sequence ratio over ranks needs response_tokens: the full length of each response")
    lengths = mask.sum(dim=1) if response_tokens is None else response_tokens
    return bounded(sequence_log_ratio(log_ratio, lengths, group)).exp().expand_as(mask)


def _token_mean(
    values: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    totals: Totals | None,
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
        raise ValueError(f"these must be [responses, tokens] of one shape: {shapes}")
