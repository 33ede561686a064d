"""Rewards: the verifier of mathematical answers, those of the built-in tasks, and the process pool that runs them or
your own reward functions.

Importing this package loads neither torch nor math-verify.
"""

from megatron_g2rl.rewards.builtin import constant_reward, task_reward
from megatron_g2rl.rewards.choices import choice_reward
from megatron_g2rl.rewards.pool import RewardPool
from megatron_g2rl.rewards.results import FunctionSpec, RewardError, RewardResult
from megatron_g2rl.rewards.verifier import math_reward, verify_math

__all__ = [
    "FunctionSpec",
    "RewardError",
    "RewardPool",
    "RewardResult",
    "choice_reward",
    "constant_reward",
    "math_reward",
    "task_reward",
    "verify_math",
]
