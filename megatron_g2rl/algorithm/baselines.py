"""Baselines of advantages (docs/method.md, section 4): what is subtracted from each reward of ONE group.

To add one, write a function like these in a separate file and register it in `registry.py` (docs/extending.md).
"""

from __future__ import annotations

from typing import NoReturn

from jaxtyping import Float
from torch import Tensor


def group_mean(rewards: Float[Tensor, "members"]) -> Float[Tensor, "members"]:
    """The mean of the group (GRPO)."""
    return rewards.mean().expand_as(rewards)


def leave_one_out(rewards: Float[Tensor, "members"]) -> Float[Tensor, "members"]:
    """The mean of the other responses of the group (RLOO); 0 in a group of one."""
    return (rewards.sum() - rewards) / max(len(rewards) - 1, 1)


def critic(rewards: Float[Tensor, "members"]) -> NoReturn:
    """Not a baseline of a group: a critic's values are subtracted from the return of each token.

    Raises:
        ValueError: always; `generalized_advantages` computes these advantages.
    """
    raise ValueError("baseline critic needs values of a critic: use generalized_advantages")
