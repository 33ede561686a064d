"""Responses and a loss shared by the tests of parallel layouts."""

from __future__ import annotations

import torch

LENGTHS = [(5, 9), (3, 1), (8, 4), (2, 12), (6, 6), (4, 3)]
"""(prompt, response) tokens of the test's responses."""
TEMPERATURE = 0.8


def sequences(vocab_size: int):
    from megatron_g2rl.policy.packing import TokenSequence

    g = torch.Generator().manual_seed(5)
    draw = lambda n: tuple(torch.randint(0, vocab_size, (n,), generator=g).tolist())  # noqa: E731
    return [TokenSequence(draw(p), draw(r)) for p, r in LENGTHS]


def weighted_loss(logprobs, entropy, batch):
    """A loss in which every response and position has its own weight, so that a misplaced token is detected."""
    from megatron_g2rl.policy.packing import row_mask

    source = torch.tensor(batch.sources, dtype=torch.float32)[:, None] + 1
    position = torch.arange(logprobs.shape[1], dtype=torch.float32) + 1
    weight = (source * 0.3).cos() / position.sqrt() * row_mask(batch)
    loss = -(weight * logprobs).sum() / 7 - 0.05 * (weight * entropy).sum()
    return loss, {"tokens": row_mask(batch).sum()}
