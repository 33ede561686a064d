"""Estimators of KL(policy || reference) from tokens sampled from the policy (docs/method.md, section 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_g2rl.algorithm.ratio import clamp_log_ratio

VALUE_BOUND = 10.0
"""Bound on the absolute value of an estimate (nats); beyond it the gradient is zero (docs/method.md, section 4)."""

KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda log_ratio: -log_ratio,
    "k2": lambda log_ratio: log_ratio.square() / 2,
    "k3": lambda log_ratio: torch.expm1(log_ratio) - log_ratio,
}
"""Name -> estimate from log(reference / policy): k1 is unbiased, k2 low-variance, k3 unbiased and never negative."""


def kl_penalty(
    logprobs: Float[Tensor, "*shape"], reference_logprobs: Float[Tensor, "*shape"], estimator: str = "k3"
) -> Float[Tensor, "*shape"]:
    """KL estimate of each token, in nats, with gradients to both arguments.

    The log-ratio is clamped to ±20 and the estimate to ±10; an infinite log-ratio gives NaN.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy.
        reference_logprobs: the same under the reference.
        estimator: a name in `KL_ESTIMATORS`.

    Returns:
        Estimates in float64 for float64 input, else float32.

    Raises:
        ValueError: unknown estimator.

    Source: docs/method.md, section 4; http://joschu.net/blog/kl-approx.html for the estimators.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}: choose one of {', '.join(KL_ESTIMATORS)}")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    log_ratio = clamp_log_ratio(reference_logprobs.to(dtype) - logprobs.to(dtype))
    return KL_ESTIMATORS[estimator](log_ratio).clamp(-VALUE_BOUND, VALUE_BOUND)
