"""Terms added to the rewards of responses in addition to shaping: penalties for length and for the KL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_g2rl.algorithm.kl import kl_penalty


def overlong_penalty(
    lengths: Int[Tensor, "responses"], max_tokens: int, buffer_tokens: int
) -> Float[Tensor, "responses"]:
    """DAPO's soft over-long penalty: 0 up to max_tokens - buffer_tokens, from there linear to -1 at max_tokens.

    Args:
        lengths: response tokens.
        max_tokens: length limit of the responses.
        buffer_tokens: number of tokens before the limit over which the penalty grows, at least 1.

    Source: arXiv 2503.14476, equation 13.
    """
    return ((max_tokens - buffer_tokens - lengths) / buffer_tokens).clamp(-1.0, 0.0)


def token_kl(
    logprobs: Sequence[Float[Tensor, "_tokens"]],
    reference_logprobs: Sequence[Float[Tensor, "_tokens"]],
    estimator: str,
) -> tuple[Float[Tensor, "_tokens"], ...]:
    """KL estimate of every token of every response (nats, `kl_penalty`), without gradient.

    Args:
        logprobs: per response, under the policy that generated it.
        reference_logprobs: the same under the reference.
        estimator: a name in `KL_ESTIMATORS`.
    """
    with torch.no_grad():
        pairs = zip(logprobs, reference_logprobs, strict=True)
        return tuple(kl_penalty(own, reference, estimator) for own, reference in pairs)
