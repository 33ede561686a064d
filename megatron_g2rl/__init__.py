"""Gradient-guided reinforcement learning (G2RL, arXiv 2512.15687) for large language models on Megatron-Core."""

__version__ = "0.1.0"
