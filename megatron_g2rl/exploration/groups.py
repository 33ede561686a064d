"""Novelty and shaped rewards of a complete rollout batch, group by group."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_g2rl.exploration.score import check_features, check_rewards, exploration_scores, result_dtype
from megatron_g2rl.exploration.shaping import shape_rewards


def shape_groups(
    features: Float[Tensor, "responses hidden"],
    rewards: Float[Tensor, "responses"],
    group_ids: Int[Tensor, "responses"],
    *,
    root: bool = True,
    correct: Bool[Tensor, "responses"] | None = None,
    mapping: str = "correct_only",
    strength: float = 0.5,
    clip: float = 3.0,
) -> tuple[Float[Tensor, "responses"], Float[Tensor, "responses"]]:
    """Shaped rewards and novelty ν of the responses of many groups.

    Args:
        features: Φ of each response.
        rewards: base rewards.
        group_ids: group id of each response: any integers, in any order, groups of any sizes.
        root: as in `exploration_scores`.
        correct, mapping, strength, clip: as in `shape_rewards`.

    Returns:
        (shaped rewards, novelty), in the order of the responses.

    Raises:
        ValueError: shapes disagree, or a feature or reward is NaN or infinite; rows are indices into the batch.

    Source: docs/method.md, sections 2-3.
    """
    check_features(features)
    check_rewards(rewards, len(features))
    _check_ids(group_ids, rewards)
    novelty = torch.empty(rewards.shape, dtype=result_dtype(features), device=features.device)
    for members in group_members(group_ids):
        novelty[members] = exploration_scores(features[members], rewards[members], root)
    options = dict(correct=correct, mapping=mapping, strength=strength, clip=clip)
    return shape_by_novelty(novelty, rewards, group_ids, **options), novelty


def shape_by_novelty(
    novelty: Float[Tensor, "responses"],
    rewards: Float[Tensor, "responses"],
    group_ids: Int[Tensor, "responses"],
    *,
    correct: Bool[Tensor, "responses"] | None = None,
    mapping: str = "correct_only",
    strength: float = 0.5,
    clip: float = 3.0,
) -> Float[Tensor, "responses"]:
    """Shaped rewards of the responses of many groups, from their novelty by any method.

    Args:
        novelty: of each response.
        rewards, group_ids: as in `shape_groups`.
        correct, mapping, strength, clip: as in `shape_rewards`.

    Raises:
        ValueError: shapes disagree, or a score or reward is NaN or infinite; rows are indices into the batch.

    Source: docs/method.md, section 3.
    """
    check_rewards(rewards, len(novelty))
    _check_ids(group_ids, rewards)
    correct = rewards > 0 if correct is None else correct
    shaped = torch.empty(rewards.shape, dtype=result_dtype(rewards), device=rewards.device)
    for members in group_members(group_ids):
        columns = (rewards[members], novelty[members], mapping, strength, clip, correct[members])
        shaped[members] = shape_rewards(*columns)
    return shaped


def _check_ids(group_ids: Int[Tensor, "responses"], rewards: Float[Tensor, "responses"]) -> None:
    if group_ids.shape != rewards.shape:
        raise ValueError(f"group ids must be [{len(rewards)}], one per response, got shape {list(group_ids.shape)}")


def group_members(group_ids: Int[Tensor, "responses"]) -> tuple[Int[Tensor, "_members"], ...]:
    """Row indices of each group, in ascending order of group id and, within a group, of row."""
    if not len(group_ids):
        return ()
    order = torch.argsort(group_ids, stable=True)
    sizes = torch.unique(group_ids, return_counts=True)[1].tolist()
    return order.split(sizes)
