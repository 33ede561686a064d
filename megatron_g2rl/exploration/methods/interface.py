"""What an exploration method is, and what it can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_g2rl.exploration.groups import group_members
from megatron_g2rl.registry import METHODS, ExtensionError

Input = Literal["features", "hidden", "embeddings", "classes"]
"""An input of `StepInputs` that is computed only if the method needs it."""


@dataclass(frozen=True)
class StepInputs:
    """What an exploration method can use of the responses of a step."""

    rewards: Float[Tensor, "responses"]
    """Base rewards."""
    correct: Bool[Tensor, "responses"]
    """True for correct responses."""
    group_ids: Int[Tensor, "responses"]
    """Group id of each response."""
    features: Float[Tensor, "responses hidden"] | None = None
    """Φ (docs/method.md, section 1)."""
    hidden: Float[Tensor, "responses hidden"] | None = None
    """Mean last hidden state of the response tokens."""
    embeddings: Float[Tensor, "responses embedding"] | None = None
    """Embedding of the text by a sentence encoder."""
    classes: Int[Tensor, "responses"] | None = None
    """Responses of a group with equal final answers have equal numbers."""
    root: bool = True
    """`exploration.root`."""

    def novelty_by_group(
        self, of_group: Callable[..., Float[Tensor, "_members"]], *columns: Tensor
    ) -> Float[Tensor, "responses"]:
        """Apply a function to the rows of each group in `columns`; its results, in the order of the responses."""
        novelty = torch.zeros(self.rewards.shape, dtype=torch.float64)
        for members in group_members(self.group_ids):
            novelty[members] = of_group(*(column[members] for column in columns)).double()
        return novelty.float()


@dataclass(frozen=True)
class Method:
    """An exploration method."""

    novelty: Callable[[StepInputs], Float[Tensor, "responses"]]
    """Computes the novelty of each response, in [0, 1]; it carries no gradient."""
    needs: tuple[Input, ...]
    """The inputs it uses in addition to rewards, correctness and groups."""
    mapping: str | None
    """Mapping from novelty to rewards if `exploration.mapping` is not set; None: rewards are never shaped."""


def load_method(name: str) -> Method:
    """The method of a registered name or an import path.

    Raises:
        ExtensionError: there is none, or it is not a `Method`.
    """
    method = METHODS.load(name)
    if not isinstance(method, Method):
        raise ExtensionError(f"exploration method {name} is a {type(method).__name__}, not a Method")
    return method
