"""Novelty and shaped rewards of a complete rollout batch, group by group."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from megatron_g2rl.exploration.score import check_features, check_rewards, exploration_scores, result_dtype
from megatron_g2rl.exploration.shaping import shape_rewards


def shape_groups(
    features: Float[Tensor, "responses hidden"],
    rewards: Float[Tensor, "responses"],
    group_ids: Int[Tensor, "responses"],
    *,
    root: bool = True,
    mapping: str = "centered",
    strength: float = 0.5,
    clip: float = 3.0,
) -> tuple[Float[Tensor, "responses"], Float[Tensor, "responses"]]:
    """Shaped rewards and novelty ν of the responses of many groups.

    Args:
        features: Φ of each response.
        rewards: base rewards.
        group_ids: group id of each response: any integers, in any order, groups of any sizes.
        root: as in `exploration_scores`.
        mapping: as in `shape_rewards`.
        strength: as in `shape_rewards`.
        clip: as in `shape_rewards`.

    Returns:
        (shaped rewards, novelty), in the order of the responses.

    Raises:
        ValueError: shapes disagree, or a feature or reward is NaN or infinite; rows are indices into the batch.

    Source: docs/method.md, sections 2-3.
    """
    check_features(features)
    check_rewards(rewards, len(features))
    if group_ids.shape != rewards.shape:
        raise ValueError(f"group ids must be [{len(rewards)}], one per response, got shape {list(group_ids.shape)}")
    shaped = torch.empty(rewards.shape, dtype=result_dtype(rewards), device=rewards.device)
    novelty = torch.empty(rewards.shape, dtype=result_dtype(features), device=features.device)
    for members in group_members(group_ids):
        novelty[members] = exploration_scores(features[members], rewards[members], root)
        shaped[members] = shape_rewards(rewards[members], novelty[members], mapping, strength, clip)
    return shaped, novelty


def group_members(group_ids: Int[Tensor, "responses"]) -> tuple[Int[Tensor, "_members"], ...]:
    """Row indices of each group, in ascending order of group id and, within a group, of row."""
    if not len(group_ids):
        return ()
    order = torch.argsort(group_ids, stable=True)
    sizes = torch.unique(group_ids, return_counts=True)[1].tolist()
    return order.split(sizes)
