"""Reward shaping: the novelty scales the base reward of each response of a group (docs/method.md, section 3).

Every mapping has the form f = 1 + strength * g. Those of this file compare all responses of a group; those of
`classwise.py` compare correct ones with correct ones. To add one, write g in a separate file and register it in
`registry.py` (docs/extending.md).
"""

from __future__ import annotations

import inspect

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_g2rl.exploration.score import check_rewards, result_dtype
from megatron_g2rl.registry import MAPPINGS, ExtensionError

NO_SPREAD = 1e-6
"""If the scores of a group differ by less than this, they carry no signal and every f is 1."""

STEEPNESS = 10.0
"""k of the smooth mappings: at 0.1 above the group's mean score, |g| is about 0.5 (logistic) or 0.75 (saturating)."""


def _minmax(scores: Float[Tensor, "responses"]) -> Float[Tensor, "responses"]:
    return (scores - scores.min()) / (scores.max() - scores.min())


def centered(scores: Float[Tensor, "responses"], rewards: Float[Tensor, "responses"]) -> Float[Tensor, "responses"]:
    """2 minmax(ν) - 1: novel answers count more and redundant ones less, correct or incorrect, as §2.5 describes."""
    return 2 * _minmax(scores) - 1


def literal(scores: Float[Tensor, "responses"], rewards: Float[Tensor, "responses"]) -> Float[Tensor, "responses"]:
    """r minmax(ν): equation 12 as printed; a novel incorrect answer is penalized less."""
    return rewards * _minmax(scores)


def linear(scores: Float[Tensor, "responses"], rewards: Float[Tensor, "responses"]) -> Float[Tensor, "responses"]:
    """minmax(ν): the factor f is never below 1."""
    return _minmax(scores)


def logistic(scores: Float[Tensor, "responses"], rewards: Float[Tensor, "responses"]) -> Float[Tensor, "responses"]:
    """2 sigmoid(k (ν - mean)) - 1: smooth, and small if the scores of the group differ little."""
    return 2 * torch.sigmoid(STEEPNESS * (scores - scores.mean())) - 1


def saturating(scores: Float[Tensor, "responses"], rewards: Float[Tensor, "responses"]) -> Float[Tensor, "responses"]:
    """tanh(k (ν - mean)): smooth and bounded, twice as steep as `logistic`."""
    return torch.tanh(STEEPNESS * (scores - scores.mean()))


def shape_rewards(
    rewards: Float[Tensor, "responses"],
    scores: Float[Tensor, "responses"],
    mapping: str = "correct_only",
    strength: float = 0.5,
    clip: float = 3.0,
    correct: Bool[Tensor, "responses"] | None = None,
) -> Float[Tensor, "responses"]:
    """Shaped reward r~ = clip(r f(ν, r), -clip, clip) of each response of ONE group.

    If all scores are within 1e-6 of each other (as in a group of one), they carry no signal: f = 1 for all of them. A
    mapping with a third parameter, `correct`, is called anyway, and decides itself what carries a signal.

    Args:
        rewards: base rewards r, in [-1, 1].
        scores: novelty ν of the same group.
        mapping: a name in `registry.MAPPINGS`, or the import path of a function like those of this file or of
            `classwise.py`.
        strength: λ; 0 leaves the rewards unchanged.
        clip: bound on the absolute value of a shaped reward.
        correct: which responses are correct; None: those with a reward above 0.

    Returns:
        Shaped rewards; float64 for float64 rewards, else float32.

    Raises:
        ValueError: unknown mapping, shapes disagree, or a reward, a score or a g is NaN or infinite.

    Source: docs/method.md, section 3, equations 12-13.
    """
    g = MAPPINGS.load(mapping)
    check_rewards(rewards, len(scores))
    if not torch.isfinite(scores).all():
        raise ValueError("novelty scores are not finite")
    base, novelty = rewards.detach().double(), scores.detach().double()
    classwise = len(inspect.signature(g).parameters) > 2
    if len(scores) and (classwise or novelty.max() - novelty.min() >= NO_SPREAD):
        correct = base > 0 if correct is None else correct
        change = g(novelty, base, correct) if classwise else g(novelty, base)
        if getattr(change, "shape", None) != base.shape or not torch.isfinite(change).all():
            raise ExtensionError(
                f"mapping {mapping} must return one finite number per response, [{len(base)}], but returned {change}"
            )
        base = base * (1 + strength * change)
    return base.clamp(-clip, clip).to(result_dtype(rewards))
