"""Elliptical bonus, as in RepExp (arXiv 2510.11686): novelty of the mean hidden state against those of the step.

RepExp computes h' (λI + Σ h_j h_j')^-1 h on sparse projections of centered hidden states. Here the hidden states are
not projected, and λ is relative to their size, so that the bonus does not depend on the scale of a model.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_g2rl.exploration.methods.interface import Method, StepInputs
from megatron_g2rl.exploration.score import TINY_NORM, check_features

RIDGE = 0.1
"""λ in units of the mean squared norm of the centered hidden states."""


def leverage(hidden: Float[Tensor, "responses hidden"]) -> Float[Tensor, "responses"]:
    """h_i' (λI + Σ_j h_j h_j')^-1 h_i over ALL responses of a step, in [0, 1): 1 for a direction that no other has."""
    check_features(hidden)
    centered = hidden.double() - hidden.double().mean(0)
    # As many rows as responses instead of hidden units: H (λI + H'H)^-1 H' = G (λI + G)^-1 with G = H H'.
    gram = centered @ centered.T
    size = gram.diagonal().mean()
    if size < TINY_NORM**2:
        return torch.zeros(len(hidden), dtype=torch.float64)
    ridge = RIDGE * size * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, gram).diagonal().clamp(0, 1)


def novelty(step: StepInputs) -> Float[Tensor, "responses"]:
    """Leverage among the responses of the step."""
    return leverage(step.hidden).float()


ELLIPTICAL = Method(novelty, needs=("hidden",), mapping="within_class")
