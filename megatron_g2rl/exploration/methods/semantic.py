"""EVOL-RL (arXiv 2509.15194): novelty of the text's embedding by a sentence encoder (docs/method.md, section 6)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from megatron_g2rl.exploration.methods.interface import Method, StepInputs
from megatron_g2rl.exploration.score import unit_features


def group_novelty(
    embeddings: Float[Tensor, "responses embedding"], correct: Bool[Tensor, "responses"]
) -> Float[Tensor, "responses"]:
    """1 - (mean similarity to the others with the same label + largest similarity to all others) / 2, for ONE group.

    The similarity is the cosine, and 0 if it is negative. A mean over no response is 0.
    """
    units, _ = unit_features(embeddings)
    others = ~torch.eye(len(units), dtype=torch.bool)
    similarity = (units @ units.T).clamp(0, 1) * others
    same_label = (correct[:, None] == correct) & others
    mean = (similarity * same_label).sum(1) / same_label.sum(1).clamp(min=1)
    largest = similarity.max(1).values if len(units) > 1 else similarity.sum(1)
    return 1 - (mean + largest) / 2


def novelty(step: StepInputs) -> Float[Tensor, "responses"]:
    """Novelty within each group."""
    return step.novelty_by_group(group_novelty, step.embeddings, step.correct)


SEMANTIC = Method(novelty, needs=("embeddings",), mapping="label_bands")
