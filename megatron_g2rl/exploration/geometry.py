"""Geometry of the update directions of a group: the statistics of §3.5 of the paper (docs/method.md, section 5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_g2rl.exploration.score import unit_features

ORTHOGONAL_BELOW = 0.1
"""A pair counts as orthogonal if its |cosine| is below this: each explains less than 1% of the other's squared norm."""


@dataclass(frozen=True)
class GeometryStats:
    """Geometry of one group, over all pairs i < j of nonzero features."""

    mean_cosine: float
    """Mean cosine of the pairs; 0 when there is no pair."""
    negative_fraction: float
    """Fraction of pairs with cosine < 0; 0 when there is no pair."""
    orthogonal_fraction: float
    """Fraction of pairs with |cosine| < 0.1; 0 when there is no pair."""
    effective_rank: float
    """exp of the entropy of the normalized eigenvalues of the cosine matrix: 1 for a single direction, n for n
    orthogonal ones; 0 when every feature is zero."""


def geometry(features: Float[Tensor, "responses hidden"]) -> GeometryStats:
    """Pairwise geometry of the features of one group.

    Zero features are ignored. The effective rank is that of the unit vectors, so that one long feature does not hide
    the directions of the others.

    Args:
        features: Φ of each response, any floating dtype.

    Returns:
        Python floats, never NaN.

    Raises:
        ValueError: `features` is not [responses, hidden], or a row contains NaN or infinity.

    Source: docs/method.md, section 5 (§3.5 of the paper); effective rank: Roy and Vetterli 2007.
    """
    units, nonzero = unit_features(features)
    units = units[nonzero]
    count = len(units)
    if count < 2:
        return GeometryStats(0.0, 0.0, 0.0, float(count))
    cosines = (units @ units.T).clamp(-1, 1)
    first, second = torch.triu_indices(count, count, offset=1, device=cosines.device)
    pairs = cosines[first, second]
    eigenvalues = torch.linalg.eigvalsh(cosines / count).clamp(min=0)
    return GeometryStats(
        mean_cosine=pairs.mean().item(),
        negative_fraction=(pairs < 0).double().mean().item(),
        orthogonal_fraction=(pairs.abs() < ORTHOGONAL_BELOW).double().mean().item(),
        effective_rank=torch.special.entr(eigenvalues).sum().exp().item(),
    )
