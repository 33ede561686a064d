"""Evaluation on held-out problems: what is computed from the responses (estimators), and the sampling (evaluate)."""

from megatron_g2rl.evaluation.estimators import majority_at_k, mean_at_k, pass_at_k

__all__ = ["majority_at_k", "mean_at_k", "pass_at_k"]
