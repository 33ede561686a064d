"""Mappings that compare correct responses with correct ones, and incorrect ones with incorrect ones.

A mapping g(scores, rewards, correct) decides itself whether scores carry a signal: within a class they do if they
differ by at least `NO_SPREAD`. What a factor above 1 means depends on the sign of the reward: it favors a response with
a positive reward and disfavors one with a negative reward.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_g2rl.exploration.shaping import NO_SPREAD


def _class_minmax(
    scores: Float[Tensor, "responses"], correct: Bool[Tensor, "responses"], *, alone: float, no_spread: float
) -> Float[Tensor, "responses"]:
    """Min-max of the scores within each class; `alone` for the only one of a class, `no_spread` for equal scores."""
    scaled = torch.zeros_like(scores)
    for members in (correct, ~correct):
        own = scores[members]
        if len(own) == 1:
            scaled[members] = alone
        elif len(own):
            spread = own.max() - own.min()
            scaled[members] = (own - own.min()) / spread if spread >= NO_SPREAD else no_spread
    return scaled


def within_class(
    scores: Float[Tensor, "responses"], rewards: Float[Tensor, "responses"], correct: Bool[Tensor, "responses"]
) -> Float[Tensor, "responses"]:
    """m for positive rewards and -m for negative ones, m = min-max within the class: novel is better in both. Ours."""
    return _class_minmax(scores, correct, alone=0.0, no_spread=0.0) * rewards.sign()


def correct_only(
    scores: Float[Tensor, "responses"], rewards: Float[Tensor, "responses"], correct: Bool[Tensor, "responses"]
) -> Float[Tensor, "responses"]:
    """`within_class` for correct responses; incorrect ones keep their rewards. Ours."""
    return within_class(scores, rewards, correct) * correct


def label_bands(
    scores: Float[Tensor, "responses"], rewards: Float[Tensor, "responses"], correct: Bool[Tensor, "responses"]
) -> Float[Tensor, "responses"]:
    """EVOL-RL's bands (arXiv 2509.15194), at a strength of 0.5: [0.5, 1] for correct, [-1, -0.5] for incorrect ones.

    More novel is better in both. The only response of a class counts as the most novel one; equal scores are the middle
    of the band.
    """
    scaled = _class_minmax(scores, correct, alone=1.0, no_spread=0.5)
    return torch.where(correct, scaled - 1, -scaled)


def product(
    scores: Float[Tensor, "responses"], rewards: Float[Tensor, "responses"], correct: Bool[Tensor, "responses"]
) -> Float[Tensor, "responses"]:
    """ν - 1 for correct responses: at a strength of 1, r ν as in DARLING (arXiv 2509.02534); others keep their rewards.

    DARLING's incorrect responses have the reward 0, which no factor changes.
    """
    return (scores - 1) * correct
