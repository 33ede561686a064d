"""Noisy rewards: what training would get from a verifier that is wrong with some probability."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor

from megatron_g2rl.records import ResponseGroup
from megatron_g2rl.rewards.distribute import ScoredRewards


def flip_rewards(
    outcome: ScoredRewards, groups: Sequence[ResponseGroup], probability: float, seed: int
) -> ScoredRewards:
    """Negate the rewards, and invert the correctness, of randomly chosen responses.

    The choice depends on seed, prompt and text only: copies of a response are all flipped or all kept, as by a verifier
    that makes systematic errors, and a resumed run flips the same ones. `parts` and `forms` are unchanged.

    Args:
        outcome: rewards of the responses of `groups`, in group order.
        groups: prompts and responses.
        probability: of a flip, in [0, 1).
        seed: of the run.
    """
    if probability == 0:
        return outcome
    flipped = chosen(groups, probability, seed)
    rewards = torch.where(flipped, -outcome.rewards, outcome.rewards)
    return replace(outcome, rewards=rewards, correct=outcome.correct ^ flipped)


def chosen(groups: Sequence[ResponseGroup], probability: float, seed: int) -> Bool[Tensor, "responses"]:
    """Whether each response is flipped."""
    return torch.tensor(
        [
            _uniform(f"{seed}/{group.prompt.id}/{response.text}") < probability
            for group in groups
            for response in group.responses
        ],
        dtype=torch.bool,
    )


def _uniform(key: str) -> float:
    """A number in [0, 1), a hash of `key`."""
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
