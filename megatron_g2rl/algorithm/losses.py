"""The losses of the update pass and of the SFT warm-up (docs/method.md, section 4).

Each returns its partial sum of the loss of the complete optimizer update, and metrics that add up in the same way: the
trainer sums over micro-batches and ranks, without any further division. `training_loss` takes typed records;
`policy_loss` is its policy term alone, with keyword arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_g2rl.algorithm.aggregation import AGGREGATIONS, UpdateTotals, aggregate
from megatron_g2rl.algorithm.kl import KL_ESTIMATORS, kl_penalty
from megatron_g2rl.algorithm.ratio import clamp_log_ratio, sequence_log_ratio, zero_outside


@dataclass(frozen=True)
class LossInputs:
    """Tensors of one micro-batch on one rank. Entries where the mask is False are never read.

    Raises:
        ValueError: shapes disagree.
    """

    logprobs: Float[Tensor, "responses tokens"]
    """Log-probabilities under the current policy (nats), with gradient."""
    old_logprobs: Float[Tensor, "responses tokens"]
    """Log-probabilities under the old policy, which generated the responses (nats)."""
    advantages: Float[Tensor, "responses"] | Float[Tensor, "responses tokens"]
    """One for each response or for each token."""
    mask: Bool[Tensor, "responses tokens"]
    """True on the local response tokens."""
    entropy: Float[Tensor, "responses tokens"] | None = None
    """Full-vocabulary entropy of each token (nats), with gradient where it is part of the loss."""
    reference_logprobs: Float[Tensor, "responses tokens"] | None = None
    """Log-probabilities under the frozen reference (nats)."""
    importance_weights: Float[Tensor, "responses tokens"] | None = None
    """Factor on the policy term of each token (trainer / rollout engine); None: 1."""
    response_tokens: Int[Tensor, "responses"] | None = None
    """Full length of each response, required where its tokens are distributed over ranks."""

    def __post_init__(self) -> None:
        optional = ("old_logprobs", "entropy", "reference_logprobs", "importance_weights")
        _check(self.logprobs, self.mask, **{name: getattr(self, name) for name in optional})
        if self.advantages.shape not in (self.mask.shape, self.mask.shape[:1]):
            raise ValueError(
                f"advantages {list(self.advantages.shape)} must be one for each response or for each token of "
                f"{list(self.mask.shape)}"
            )


@dataclass(frozen=True)
class LossOptions:
    """Options of the loss.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high."""
    dual_clip: float | None = 3.0
    """Bound on the ratio where the advantage is negative; None: no bound."""
    ratio: Literal["token", "sequence"] = "token"
    """`sequence`: every token gets its response's length-normalized ratio (GSPO)."""
    aggregation: str = "token_mean"
    """A name in `AGGREGATIONS`."""
    kl_coefficient: float = 0.0
    """Weight of the KL term; 0 leaves it out of the loss."""
    kl_estimator: str = "k3"
    """A name in `KL_ESTIMATORS`."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus; 0 leaves it out of the loss."""

    def __post_init__(self) -> None:
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip must be above 1 (or None to disable it), got {self.dual_clip}")
        if self.ratio not in ("token", "sequence"):
            raise ValueError(f"unknown ratio {self.ratio!r}: choose token or sequence")
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"unknown aggregation {self.aggregation!r}: choose one of {', '.join(AGGREGATIONS)}")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"unknown KL estimator {self.kl_estimator!r}: choose one of {', '.join(KL_ESTIMATORS)}")


def training_loss(
    inputs: LossInputs,
    options: LossOptions,
    totals: UpdateTotals | None = None,
    cp_group: ProcessGroup | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Policy loss + kl_coefficient * KL to the reference - entropy_coefficient * entropy, with the same aggregation.

    Args:
        inputs: tensors of the micro-batch.
        options: options of the run.
        totals: size of the complete update; None: this call is the complete update.
        cp_group: context-parallel group over which the tokens are distributed; used by `ratio="sequence"` only.

    Returns:
        The loss, and the metrics of `policy_loss` plus `policy_loss` (aggregated as in the loss) and, if their inputs
        are given, `kl` and `entropy` (token means, nats). All are partial sums, to be added over micro-batches and
        ranks.

    Raises:
        ValueError: a coefficient is set but its tensor is missing, or as in `policy_loss`.

    Source: docs/method.md, section 4.
    """
    if options.kl_coefficient and inputs.reference_logprobs is None:
        raise ValueError(f"kl_coefficient is {options.kl_coefficient} but there are no reference_logprobs")
    if options.entropy_coefficient and inputs.entropy is None:
        raise ValueError(f"entropy_coefficient is {options.entropy_coefficient} but there is no entropy")
    mask, response_tokens = inputs.mask.bool(), inputs.response_tokens
    update = {"totals": totals, "response_tokens": response_tokens}
    loss, metrics = _policy_term(inputs, options, totals, cp_group)
    metrics["policy_loss"] = loss.detach()
    if inputs.reference_logprobs is not None:
        reference = zero_outside(inputs.reference_logprobs.detach(), mask)
        kl = kl_penalty(zero_outside(inputs.logprobs, mask), reference, options.kl_estimator)
        metrics["kl"] = _token_mean(kl, mask, totals, response_tokens)
        if options.kl_coefficient:
            loss = loss + options.kl_coefficient * aggregate(kl, mask, options.aggregation, **update)
    if inputs.entropy is not None:
        entropy = zero_outside(inputs.entropy, mask)
        metrics["entropy"] = _token_mean(entropy, mask, totals, response_tokens)
        if options.entropy_coefficient:
            loss = loss - options.entropy_coefficient * aggregate(entropy, mask, options.aggregation, **update)
    return loss, metrics


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
    inputs = LossInputs(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        importance_weights=importance_weights,
        response_tokens=response_tokens,
    )
    options = LossOptions(clip_low, clip_high, dual_clip, ratio, aggregation)
    return _policy_term(inputs, options, totals, cp_group)


def _policy_term(
    inputs: LossInputs, options: LossOptions, totals: UpdateTotals | None, cp_group: ProcessGroup | None
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The loss of `policy_loss` and its metrics."""
    mask, response_tokens, dual_clip = inputs.mask.bool(), inputs.response_tokens, options.dual_clip
    low, high = 1 - options.clip_low, 1 + options.clip_high
    log_ratio = zero_outside(inputs.logprobs, mask) - zero_outside(inputs.old_logprobs.detach(), mask)
    rho = _ratio(log_ratio, mask, options.ratio, response_tokens, cp_group)
    advantages = inputs.advantages.detach()
    advantage = zero_outside(advantages if advantages.ndim == 2 else advantages[:, None].expand_as(mask), mask)

    losses = torch.maximum(-rho * advantage, -rho.clamp(low, high) * advantage)
    if dual_clip is not None:
        losses = torch.where(advantage < 0, torch.minimum(losses, -dual_clip * advantage), losses)
    if inputs.importance_weights is not None:
        losses = losses * zero_outside(inputs.importance_weights.detach(), mask)
    loss = aggregate(losses, mask, options.aggregation, totals=totals, response_tokens=response_tokens)

    observed, negative, positive = rho.detach(), advantage < 0, advantage > 0
    metrics = {
        "ratio_mean": observed,
        "approx_kl": kl_penalty(torch.zeros_like(log_ratio), log_ratio.detach(), "k3"),
        "clip_fraction_low": negative & (observed < low),
        "clip_fraction_high": positive & (observed > high),
        "dual_clip_fraction": negative & (observed > (torch.inf if dual_clip is None else dual_clip)),
    }
    return loss, {
        name: _token_mean(value.to(rho.dtype), mask, totals, response_tokens) for name, value in metrics.items()
    }


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
