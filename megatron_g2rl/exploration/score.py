"""The novelty ν: how little a response's update direction overlaps with the rest of its group.

The formulas are in docs/method.md, section 2.

All per-group computation is in float64. A group is small (m x H), and the square root in ν turns an error of 1e-7 in a
cosine into one of 3e-4 in ν: in float32, a group of identical responses would have a spread of pure rounding
error, which shaping would stretch to its full range.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TINY_NORM = 1e-12
"""A feature with a smaller norm counts as zero: an empty response, or one whose tokens all had probability one."""


def similarity(features: Float[Tensor, "responses hidden"]) -> Float[Tensor, "responses responses"]:
    """Cosine similarity S of every pair of features.

    The row and column of a zero feature are zero, the diagonal entry included: it is redundant with nothing.

    Args:
        features: Φ of each response, any floating dtype.

    Returns:
        S in [-1, 1], symmetric; float64 for float64 features, else float32.

    Raises:
        ValueError: `features` is not [responses, hidden], or a row contains NaN or infinity.

    Source: docs/method.md, section 2, equation 9.
    """
    return _cosines(features).to(result_dtype(features))


def exploration_scores(
    features: Float[Tensor, "responses hidden"], rewards: Float[Tensor, "responses"], root: bool = True
) -> Float[Tensor, "responses"]:
    """Novelty ν of each response of ONE group.

    ν_i = sqrt(max(1 - Σ_j w_ij S_ij², 0)), where w_i is the softmax over the base rewards of the other responses. A
    zero feature has ν = 1 (it overlaps with nothing) and adds nothing to the redundancy of the others; a group of one
    has ν = 0.

    Args:
        features: Φ of each response of the group, any floating dtype.
        rewards: base rewards, before shaping.
        root: take the square root, as in equation 11; False gives ν².

    Returns:
        ν in [0, 1]; float64 for float64 features, else float32. It carries no gradient.

    Raises:
        ValueError: shapes disagree, or a feature or reward is NaN or infinite.

    Source: docs/method.md, section 2, equations 9-11.
    """
    check_rewards(rewards, len(features))
    cosines = _cosines(features)
    if len(features) < 2:
        return torch.zeros(len(features), dtype=result_dtype(features), device=features.device)
    diagonal = torch.eye(len(features), dtype=torch.bool, device=features.device)
    # softmax subtracts the row's maximum, so that large rewards do not overflow; its denominator is then at least one,
    # so equation 10's epsilon is not needed.
    logits = rewards.detach().to(cosines).expand(len(features), -1).masked_fill(diagonal, -torch.inf)
    novelty = (1 - (logits.softmax(dim=1) * cosines.square()).sum(dim=1)).clamp(min=0)
    return (novelty.sqrt() if root else novelty).to(result_dtype(features))


def unit_features(
    features: Float[Tensor, "responses hidden"],
) -> tuple[Float[Tensor, "responses hidden"], Bool[Tensor, "responses"]]:
    """Features normalized to unit length in float64, and which of them are nonzero.

    Args:
        features: Φ of each response, any floating dtype.

    Returns:
        Unit vectors (zero features stay zero) and a mask that is True for nonzero features.

    Raises:
        ValueError: `features` is not [responses, hidden], or a row contains NaN or infinity.
    """
    check_features(features)
    vectors = features.detach().double()
    norms = torch.linalg.vector_norm(vectors, dim=1)
    nonzero = norms >= TINY_NORM
    return vectors / norms.where(nonzero, torch.inf)[:, None], nonzero


def check_features(features: Float[Tensor, "responses hidden"]) -> None:
    """Raise ValueError, naming the rows, for features of a wrong shape or with non-finite values."""
    if features.ndim != 2:
        raise ValueError(f"features must be [responses, hidden], got shape {list(features.shape)}")
    bad = (~torch.isfinite(features).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"features of response rows {bad} are not finite: the pass that computed them overflowed or read "
            "uninitialized memory; check the model's hidden states and padded vocabulary rows"
        )


def check_rewards(rewards: Float[Tensor, "responses"], responses: int) -> None:
    """Raise ValueError, naming the rows, for rewards of a wrong shape or with non-finite values."""
    if rewards.shape != (responses,):
        raise ValueError(f"rewards must be [{responses}], one per response, got shape {list(rewards.shape)}")
    bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"rewards of response rows {bad} are not finite: check the reward function")


def result_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _cosines(features: Float[Tensor, "responses hidden"]) -> Float[Tensor, "responses responses"]:
    units, _ = unit_features(features)
    return (units @ units.T).clamp(-1, 1)
