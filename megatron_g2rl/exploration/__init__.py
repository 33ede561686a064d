"""The method: which responses of a group explore directions that the others do not, and what that does to rewards.

Pure mathematics on tensors (docs/method.md, sections 2-3; arXiv 2512.15687): features in, scores and shaped rewards
out. Features are made in `policy/head/`; what becomes of the shaped rewards is in `algorithm/advantages.py`.
"""

from megatron_g2rl.exploration.geometry import GeometryStats, geometry
from megatron_g2rl.exploration.groups import shape_groups
from megatron_g2rl.exploration.score import exploration_scores, similarity
from megatron_g2rl.exploration.shaping import MAPPINGS, shape_rewards
from megatron_g2rl.exploration.topk import features_from_topk

__all__ = [
    "MAPPINGS",
    "GeometryStats",
    "exploration_scores",
    "features_from_topk",
    "geometry",
    "shape_groups",
    "shape_rewards",
    "similarity",
]
