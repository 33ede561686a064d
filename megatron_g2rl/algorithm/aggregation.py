"""How token values become one number over a whole optimizer update, whatever the cut into micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_mean_token_sum")


@dataclass(frozen=True)
class Totals:
    """What an update holds in all its micro-batches on all its data- and context-parallel ranks."""

    tokens: float
    """Response tokens that the loss counts; each counted once."""
    responses: float
    """Responses with at least one such token."""

    @classmethod
    def of(
        cls, mask: Bool[Tensor, "responses tokens"], response_tokens: Int[Tensor, "responses"] | None = None
    ) -> Totals:
        """Totals of the responses of one mask (or of their full lengths, where the mask shows only local tokens)."""
        lengths = mask.bool().sum(dim=1) if response_tokens is None else response_tokens
        return cls(tokens=float(lengths.sum()), responses=float((lengths > 0).sum()))


def aggregate(
    values: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    aggregation: str,
    *,
    totals: Totals | None = None,
    response_tokens: Int[Tensor, "responses"] | None = None,
) -> Float[Tensor, ""]:
    """One number of the token values: this call's addend to the value over the whole update.

    `token_mean`: sum over tokens / tokens of the update. `sequence_mean`: mean over responses of each one's token mean.
    `sequence_mean_token_sum` (Dr. GRPO up to a constant): mean over responses of each one's token sum. The addends of
    all micro-batches and ranks of an update sum to its value, and so do their gradients. Responses without a token
    count nowhere; with no token at all the result is 0, connected to `values`.

    Args:
        values: any values, also NaN, where the mask is False.
        mask: True on the local response tokens.
        aggregation: a name in `AGGREGATIONS`.
        totals: what the whole update holds; None: this call is the whole update.
        response_tokens: full length of each response, needed where a response's tokens are spread over ranks.

    Raises:
        ValueError: unknown aggregation, or shapes disagree.

    Source: docs/method.md, section 4.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}: choose one of {', '.join(AGGREGATIONS)}")
    if values.shape != mask.shape:
        raise ValueError(f"values {list(values.shape)} and mask {list(mask.shape)} must have one shape")
    totals = totals or Totals.of(mask, response_tokens)
    sums = torch.where(mask.bool(), values, 0.0).sum(dim=1)
    if aggregation == "token_mean":
        return sums.sum() / max(totals.tokens, 1.0)
    if aggregation == "sequence_mean":
        sums = sums / (mask.bool().sum(dim=1) if response_tokens is None else response_tokens).clamp(min=1)
    return sums.sum() / max(totals.responses, 1.0)
