"""Rewards: the judge of mathematical answers, and the pool of killable processes that runs it (or a function of yours).

Importing this package loads neither torch nor math-verify.
"""

from megatron_g2rl.rewards.pool import RewardPool
from megatron_g2rl.rewards.results import FunctionSpec, RewardError, RewardResult
from megatron_g2rl.rewards.verifier import math_reward, verify_math

__all__ = ["FunctionSpec", "RewardError", "RewardPool", "RewardResult", "math_reward", "verify_math"]
