"""Novelty of the mean last hidden state: G2RL's formula for ν, applied to hidden states instead of update directions.

Not from a paper: a control for `gradient` with the same layer, cosines and weights, but without the output embedding.
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor

from megatron_g2rl.exploration.methods.interface import Method, StepInputs
from megatron_g2rl.exploration.score import exploration_scores


def novelty(step: StepInputs) -> Float[Tensor, "responses"]:
    """ν by equations 9-11 (docs/method.md, section 2) of the mean hidden states, within each group."""
    return step.novelty_by_group(partial(exploration_scores, root=step.root), step.hidden, step.rewards)


HIDDEN = Method(novelty, needs=("hidden",), mapping="correct_only")
