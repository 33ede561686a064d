"""Advantages and losses (docs/method.md, section 4): pure mathematics on tensors.

Every number is normalized over the complete optimizer update (`UpdateTotals`), so losses and metrics sum to the same
value and gradient however the update is split into micro-batches, data-parallel ranks and context-parallel ranks.
"""

from megatron_g2rl.algorithm.advantages import group_advantages, has_spread
from megatron_g2rl.algorithm.aggregation import AGGREGATIONS, UpdateTotals, aggregate
from megatron_g2rl.algorithm.importance import (
    importance_weights,
    is_rejected,
    rollout_mismatch,
    sequence_ratio,
    truncated_importance_weights,
)
from megatron_g2rl.algorithm.kl import KL_ESTIMATORS, kl_penalty
from megatron_g2rl.algorithm.losses import LossInputs, LossOptions, policy_loss, supervised_loss, training_loss
from megatron_g2rl.algorithm.penalties import overlong_penalty, token_kl
from megatron_g2rl.algorithm.values import explained_variance, generalized_advantages, value_loss, whiten

__all__ = [
    "AGGREGATIONS",
    "KL_ESTIMATORS",
    "LossInputs",
    "LossOptions",
    "UpdateTotals",
    "aggregate",
    "explained_variance",
    "generalized_advantages",
    "group_advantages",
    "has_spread",
    "importance_weights",
    "is_rejected",
    "kl_penalty",
    "overlong_penalty",
    "policy_loss",
    "rollout_mismatch",
    "sequence_ratio",
    "supervised_loss",
    "token_kl",
    "training_loss",
    "truncated_importance_weights",
    "value_loss",
    "whiten",
]
