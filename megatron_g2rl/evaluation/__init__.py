"""Evaluation on a separate problem set: accuracy estimators (`estimators`) and generation and scoring (`evaluate`)."""

from megatron_g2rl.evaluation.estimators import distinct_at_k, majority_at_k, mean_at_k, pass_at_k

__all__ = ["distinct_at_k", "majority_at_k", "mean_at_k", "pass_at_k"]
