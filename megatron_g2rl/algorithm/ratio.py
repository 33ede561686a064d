"""Log-ratios of two policies on the same tokens, bounded so that their exponential is finite."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

LOG_RATIO_BOUND = 20.0
"""Bound on the absolute value of a log-ratio (nats); beyond it the gradient is zero (docs/method.md, section 4)."""


def bounded(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Clamp log-ratios to ±20; an infinite one becomes NaN.

    An infinite log-probability of a sampled token is a fault (a masked vocabulary row, an overflow) that the clamp
    would hide; as NaN it reaches the loss, and the update is skipped and counted.
    """
    return torch.where(torch.isfinite(log_ratio), log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND), torch.nan)


def keep(values: Float[Tensor, "responses tokens"], mask: Bool[Tensor, "responses tokens"]) -> Tensor:
    """Values in at least float32, with zero where the mask is False whatever was there, in value and in gradient."""
    return torch.where(mask, values.to(torch.promote_types(values.dtype, torch.float32)), 0.0)


def sequence_log_ratio(
    log_ratio: Float[Tensor, "responses tokens"],
    response_tokens: Int[Tensor, "responses"],
    group: ProcessGroup | None,
) -> Float[Tensor, "responses 1"]:
    """Mean log-ratio over all tokens of each response, also those on the other ranks of `group`.

    Args:
        log_ratio: of the local tokens, zero where there is none.
        response_tokens: full length of each response.
        group: ranks that share the tokens of these responses; None: they are all here.

    Source: docs/method.md, section 4, equation 3, length-normalised as in GSPO (arXiv 2507.18071).
    """
    sums = log_ratio.sum(dim=1, keepdim=True)
    if group is not None:
        sums = _SumOverRanks.apply(sums, group)
    return sums / response_tokens.clamp(min=1)[:, None]


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks whose losses are added: each rank's loss depends on every addend, so gradients are summed too."""

    @staticmethod
    def forward(ctx, addend: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = addend.clone(memory_format=torch.contiguous_format)
        all_reduce(total, ReduceOp.SUM, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        all_reduce(total, ReduceOp.SUM, group=ctx.group)
        return total, None
