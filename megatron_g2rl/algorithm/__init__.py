"""Advantages and losses (docs/method.md, section 4): pure mathematics on tensors.

Every number is normalised over the whole optimizer update (`Totals`), so the losses and metrics of any cut of the
update into micro-batches, data-parallel ranks or context-parallel ranks add up to the same value and gradient.
"""

from megatron_g2rl.algorithm.advantages import group_advantages, has_spread
from megatron_g2rl.algorithm.aggregation import AGGREGATIONS, Totals, aggregate
from megatron_g2rl.algorithm.importance import rollout_mismatch, truncated_importance_weights
from megatron_g2rl.algorithm.kl import KL_ESTIMATORS, kl_penalty
from megatron_g2rl.algorithm.losses import policy_loss, supervised_loss, training_loss

__all__ = [
    "AGGREGATIONS",
    "KL_ESTIMATORS",
    "Totals",
    "aggregate",
    "group_advantages",
    "has_spread",
    "kl_penalty",
    "policy_loss",
    "rollout_mismatch",
    "supervised_loss",
    "training_loss",
    "truncated_importance_weights",
]
