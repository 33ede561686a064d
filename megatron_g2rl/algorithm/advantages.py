"""Advantages of the responses of many groups (docs/method.md, section 4).

Group statistics are computed in float64, which is cheap for a few rewards per group. In float32 the mean of equal
rewards can differ from them by a rounding error, and dividing it by a standard deviation of the same size would turn it
into an advantage.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_g2rl.registry import BASELINES, ExtensionError

SPREAD_TOLERANCE = 1e-6
"""Rewards of a group count as equal when they differ by at most this."""


def group_advantages(
    rewards: Float[Tensor, "responses"],
    group: Int[Tensor, "responses"],
    *,
    normalize_std: bool = True,
    baseline: str = "group_mean",
    epsilon: float = 1e-6,
) -> Float[Tensor, "responses"]:
    """Advantage A_i = (r_i - baseline) / (std + epsilon) of each response inside its group.

    Advantages are exactly zero in a group of one and in a group whose rewards are within 1e-6 of each other.

    Args:
        rewards: shaped rewards.
        group: group id of each response: any integers, in any order, groups of any sizes.
        normalize_std: divide by the group's standard deviation (unbiased, ddof=1); False is Dr. GRPO.
        baseline: a name in `registry.BASELINES` (`group_mean`, `leave_one_out`), or the import path of a function like
            those of `baselines.py`.
        epsilon: added to the standard deviation.

    Returns:
        Advantages in the order of `rewards`; float64 for float64 rewards, else float32. They carry no gradient.

    Raises:
        ValueError: shapes disagree, a reward or a baseline's result is NaN or infinite, or the baseline is unknown.

    Source: docs/method.md, section 4, equation 2; verl's GRPO estimator for ddof and epsilon.
    """
    _check(rewards, group)
    values = rewards.detach().double()
    member, groups = _membership(group)
    size = values.new_zeros(groups).index_add_(0, member, torch.ones_like(values))
    centered = values - (values.new_zeros(groups).index_add_(0, member, values) / size)[member]
    others = (size - 1).clamp(min=1)
    std = (values.new_zeros(groups).index_add_(0, member, centered.square()) / others).sqrt()
    advantages = values - _baselines(values, member, baseline)
    if normalize_std:
        advantages = advantages / (std[member] + epsilon)
    advantages = advantages.where(_spread(values, member, groups) > SPREAD_TOLERANCE, 0.0)
    return advantages.to(torch.promote_types(rewards.dtype, torch.float32))


def has_spread(
    rewards: Float[Tensor, "responses"], group_ids: Int[Tensor, "responses"], tolerance: float = SPREAD_TOLERANCE
) -> Bool[Tensor, "responses"]:
    """True for the responses of groups whose rewards differ by more than `tolerance`: only these give a gradient.

    Meant for SHAPED rewards: a group whose base rewards are all equal can have spread after shaping.

    Args:
        rewards: shaped rewards.
        group_ids: group id of each response.
        tolerance: largest difference between two rewards that still count as equal.

    Raises:
        ValueError: shapes disagree, or a reward is NaN or infinite.

    Source: docs/method.md, section 3, last paragraph.
    """
    _check(rewards, group_ids)
    member, groups = _membership(group_ids)
    return _spread(rewards.detach().double(), member, groups) > tolerance


def _check(rewards: Float[Tensor, "responses"], group_ids: Int[Tensor, "responses"]) -> None:
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards and group ids must both be [responses], got {list(rewards.shape)} and {list(group_ids.shape)}"
        )
    bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"rewards of response rows {bad} are not finite: check the reward function")


def _membership(group_ids: Int[Tensor, "responses"]) -> tuple[Int[Tensor, "responses"], int]:
    """Index of each response's group among the distinct ids, and the number of groups."""
    distinct, member = torch.unique(group_ids, return_inverse=True)
    return member, len(distinct)


def _baselines(
    values: Float[Tensor, "responses"], member: Int[Tensor, "responses"], baseline: str
) -> Float[Tensor, "responses"]:
    """The baseline of each response, computed group by group."""
    compute = BASELINES.load(baseline)
    order = torch.argsort(member, stable=True)
    result = torch.empty_like(values)
    for rows in order.split(torch.bincount(member).tolist()) if len(values) else ():
        computed = compute(values[rows])
        if getattr(computed, "shape", None) not in (rows.shape, ()) or not torch.isfinite(computed).all():
            raise ExtensionError(
                f"baseline {baseline} must return one finite number per response, [{len(rows)}], or a single one, but "
                f"returned {computed}"
            )
        result[rows] = computed
    return result


def _spread(
    values: Float[Tensor, "responses"], member: Int[Tensor, "responses"], groups: int
) -> Float[Tensor, "responses"]:
    """Largest minus smallest value of the group of each response."""
    largest = values.new_empty(groups).scatter_reduce_(0, member, values, "amax", include_self=False)
    smallest = values.new_empty(groups).scatter_reduce_(0, member, values, "amin", include_self=False)
    return (largest - smallest)[member]
