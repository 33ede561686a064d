"""The method: which responses of a group explore directions that the others do not, and what that does to rewards.

Pure mathematics on tensors (METHOD 2-3, G2RL, arXiv 2512.15687): features in, scores and shaped rewards out. How the
features are made is the language-model head's business (`policy/head/`); what becomes of the shaped rewards is the
algorithm's (`algorithm/advantages.py`).
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
