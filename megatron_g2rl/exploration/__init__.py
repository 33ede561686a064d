"""The method: which responses of a group explore directions that the others do not, and how that changes rewards.

Pure mathematics on tensors (docs/method.md, sections 2-3; arXiv 2512.15687): features in, novelty and shaped
rewards out. `policy/head/` computes the features; `algorithm/advantages.py` uses the shaped rewards.
"""

from megatron_g2rl.exploration.geometry import GeometryStats, geometry
from megatron_g2rl.exploration.groups import shape_by_novelty, shape_groups
from megatron_g2rl.exploration.score import exploration_scores, similarity
from megatron_g2rl.exploration.shaping import shape_rewards
from megatron_g2rl.exploration.topk import features_from_topk
from megatron_g2rl.registry import MAPPINGS

__all__ = [
    "MAPPINGS",
    "GeometryStats",
    "exploration_scores",
    "features_from_topk",
    "geometry",
    "shape_by_novelty",
    "shape_groups",
    "shape_rewards",
    "similarity",
]
