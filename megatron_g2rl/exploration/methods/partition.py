"""DARLING's partition (arXiv 2509.02534): how rare the class of a response is.

DARLING partitions by a learned classifier of meaning; here, responses whose final answers are equal by the verifier are
one class, and so are those without a final answer.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from megatron_g2rl.exploration.methods.interface import Method, StepInputs


def rarity(classes: Int[Tensor, "responses"]) -> Float[Tensor, "responses"]:
    """Fraction of the other responses of ONE group that are in another class; 0 in a group of one."""
    different = classes[:, None] != classes
    return different.sum(1) / max(len(classes) - 1, 1)


def novelty(step: StepInputs) -> Float[Tensor, "responses"]:
    """Rarity within each group."""
    return step.novelty_by_group(rarity, step.classes)


PARTITION = Method(novelty, needs=("classes",), mapping="product")
