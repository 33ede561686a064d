"""G2RL (arXiv 2512.15687): novelty of the update direction Φ of a response (docs/method.md, sections 1 and 2)."""

from __future__ import annotations

from functools import partial

from jaxtyping import Float
from torch import Tensor

from megatron_g2rl.exploration.methods.interface import Method, StepInputs
from megatron_g2rl.exploration.score import exploration_scores


def novelty(step: StepInputs) -> Float[Tensor, "responses"]:
    """ν by equations 9-11, within each group."""
    return step.novelty_by_group(partial(exploration_scores, root=step.root), step.features, step.rewards)


GRADIENT = Method(novelty, needs=("features",), mapping="correct_only")
