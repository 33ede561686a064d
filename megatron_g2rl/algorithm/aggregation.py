"""Aggregates token values over a complete optimizer update, however it is split into micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_mean_token_sum")


@dataclass(frozen=True)
class UpdateTotals:
    """Size of an update, over all its micro-batches and all data- and context-parallel ranks."""

    tokens: float
    """Response tokens in the loss, each counted once."""
    responses: float
    """Responses with at least one such token."""

    @classmethod
    def of(
        cls, mask: Bool[Tensor, "responses tokens"], response_tokens: Int[Tensor, "responses"] | None = None
    ) -> UpdateTotals:
        """Totals of the responses of one mask, or of their full lengths where the mask covers local tokens only."""
        lengths = mask.bool().sum(dim=1) if response_tokens is None else response_tokens
        return cls(tokens=float(lengths.sum()), responses=float((lengths > 0).sum()))


def aggregate(
    values: Float[Tensor, "responses tokens"],
    mask: Bool[Tensor, "responses tokens"],
    aggregation: str,
    *,
    totals: UpdateTotals | None = None,
    response_tokens: Int[Tensor, "responses"] | None = None,
) -> Float[Tensor, ""]:
    """Aggregate token values to a scalar: the partial sum that this call contributes to the complete update.

    `token_mean`: sum over tokens / tokens of the update. `sequence_mean`: mean over responses of each one's token mean.
    `sequence_mean_token_sum` (Dr. GRPO up to a constant): mean over responses of each one's token sum. The partial sums
    of all micro-batches and ranks of an update add up to its value, and so do their gradients. Responses without tokens
    are ignored; without any token the result is 0, still attached to the graph of `values`.

    Args:
        values: token values; entries where the mask is False are ignored, NaN included.
        mask: True on the local response tokens.
        aggregation: a name in `AGGREGATIONS`.
        totals: size of the complete update; None: this call is the complete update.
        response_tokens: full length of each response, required where its tokens are distributed over ranks.

    Raises:
        ValueError: unknown aggregation, or shapes disagree.

    Source: docs/method.md, section 4.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {aggregation!r}: choose one of {', '.join(AGGREGATIONS)}")
    if values.shape != mask.shape:
        raise ValueError(f"values {list(values.shape)} and mask {list(mask.shape)} must have the same shape")
    totals = totals or UpdateTotals.of(mask, response_tokens)
    sums = torch.where(mask.bool(), values, 0.0).sum(dim=1)
    if aggregation == "token_mean":
        return sums.sum() / max(totals.tokens, 1.0)
    if aggregation == "sequence_mean":
        sums = sums / (mask.bool().sum(dim=1) if response_tokens is None else response_tokens).clamp(min=1)
    return sums.sum() / max(totals.responses, 1.0)
