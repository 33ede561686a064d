"""Log-ratios of two policies on the same tokens, clamped so that their exponential is finite."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

LOG_RATIO_BOUND = 20.0
"""Bound on the absolute value of a log-ratio (nats); beyond it the gradient is zero (docs/method.md, section 4)."""


def clamp_log_ratio(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Clamp log-ratios to ±20; infinite ones become NaN.

    An infinite log-probability of a sampled token is a bug (a masked vocabulary row, an overflow) that clamping would
    hide. As NaN it reaches the loss, and the update is skipped and counted.
    """
    return torch.where(torch.isfinite(log_ratio), log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND), torch.nan)


def zero_outside(values: Float[Tensor, "responses tokens"], mask: Bool[Tensor, "responses tokens"]) -> Tensor:
    """Values in at least float32; where the mask is False, value and gradient are zero, even for NaN."""
    return torch.where(mask, values.to(torch.promote_types(values.dtype, torch.float32)), 0.0)


def sequence_log_ratio(
    log_ratio: Float[Tensor, "responses tokens"],
    response_tokens: Int[Tensor, "responses"],
    cp_group: ProcessGroup | None,
) -> Float[Tensor, "responses 1"]:
    """Mean log-ratio over all tokens of each response, those on the other ranks of `cp_group` included.

    Args:
        log_ratio: log-ratios of the local tokens, zero at other positions.
        response_tokens: full length of each response.
        cp_group: context-parallel group over which the tokens are distributed; None: all tokens are on this rank.

    Source: docs/method.md, section 4, equation 3, length-normalized as in GSPO (arXiv 2507.18071).
    """
    sums = log_ratio.sum(dim=1, keepdim=True)
    if cp_group is not None:
        sums = _SumOverRanks.apply(sums, cp_group)
    return sums / response_tokens.clamp(min=1)[:, None]


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks whose losses are added: each rank's loss depends on every partial sum, so gradients are summed."""

    @staticmethod
    def forward(ctx, partial_sum: Tensor, cp_group: ProcessGroup) -> Tensor:
        ctx.cp_group = cp_group
        total = partial_sum.clone(memory_format=torch.contiguous_format)
        all_reduce(total, ReduceOp.SUM, group=cp_group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        all_reduce(total, ReduceOp.SUM, group=ctx.cp_group)
        return total, None
