"""Φ of each response from its counts: the last step of both passes that compute it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_g2rl.policy.head.device_timer import DeviceTimer
from megatron_g2rl.policy.head.prior import ExpectedCounts
from megatron_g2rl.policy.head.products import times_rows
from megatron_g2rl.policy.head.softmax import all_reduce, within

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def features_from_counts(
    counts: ExpectedCounts,
    targets: Int[Tensor, "tokens"],
    weight: Float[Tensor, "vocab_local hidden"],
    *,
    valid: int,
    vocab_start: int,
    tp_group: dist.ProcessGroup | None,
    reduce_group: dist.ProcessGroup | None,
    timer: DeviceTimer | None,
) -> Float[Tensor, "responses hidden"]:
    """(c - P) W / A, summed over the ranks of `reduce_group` in one collective that has A as its last column.

    Args:
        counts: with -P in its balance, to which c is added.
        targets: global token ids.
        weight: this rank's rows of the output embedding.
        valid: number of these rows that are not padding.
        vocab_start: global id of this rank's first row.
        tp_group, reduce_group, timer: as in `score_tokens`.
    """
    balance, owner, weights = counts.balance, counts.owner, counts.weights
    with timed(timer, "features"):
        local, inside = within(targets - vocab_start, 0, max(valid, 1))
        balance.index_put_((owner, local), weights * (inside & (valid > 0)), accumulate=True)
        result = balance.new_zeros(balance.shape[0], weight.shape[1] + 1)
        result[:, :-1] = times_rows(balance, weight)
        # Every tensor-parallel rank has all tokens: only the first may count them.
        if tp_group is None or dist.get_rank(tp_group) == 0:
            result[:, -1].index_add_(0, owner, weights)
    with timed(timer, "reduce_head"):
        all_reduce(result, reduce_group if reduce_group is not None else tp_group)
    total = result[:, -1:]
    return result[:, :-1] / torch.where(total > 0, total, torch.ones_like(total))


def timed(timer: DeviceTimer | None, name: str):
    """`timer.measure(name)`, or nothing without a timer."""
    return nullcontext() if timer is None else timer.measure(name)
