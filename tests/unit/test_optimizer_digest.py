"""The digest of optimizer state does not depend on how ranks split it, and changes with every corruption."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_g2rl.policy.checkpoint.optimizer_state import _weighted_bits
from megatron_g2rl.policy.checkpoint.pieces import Piece

MODULUS = 1 << 64


def by_definition(tensor: torch.Tensor) -> int:
    """Sum of bit pattern times (2 * position + 1), in Python integers."""
    bits = tensor.flatten().view(torch.int32).tolist()
    return sum(value * (2 * position + 1) for position, value in enumerate(bits)) % MODULUS


def digest_of(tensor: torch.Tensor, piece: Piece, low: int, high: int) -> int:
    """Digest of the elements `low` to `high` of a flattened block of `tensor`."""
    block = tensor[tuple(slice(a, a + n) for a, n in zip(piece.offset, piece.shape, strict=True))]
    return int(_weighted_bits(block.reshape(-1)[low:high].contiguous(), piece, low)) % MODULUS


def split(size: int, r: random.Random) -> list[tuple[int, int]]:
    edges = sorted({0, size, *(r.randint(0, size) for _ in range(r.randint(0, 5)))})
    return list(zip(edges, edges[1:], strict=False))


@pytest.mark.parametrize("seed", range(30))
def test_digests_of_parts_sum_to_that_of_the_tensor_for_any_split(seed):
    r = random.Random(seed)
    leading = r.choice([(), (3,), (2, 4)])
    body = r.choice([(r.randint(1, 40),), (r.randint(1, 12), r.randint(1, 17))])
    torch.manual_seed(seed)
    tensor = torch.randn(*leading, *body) * 10.0 ** r.randint(-30, 30)
    total = 0
    grids = [[(i, i + 1) for i in range(n)] for n in leading] + [split(n, r) for n in body]
    for ranges in _product(grids):
        piece = Piece(
            "w", tuple(tensor.shape), tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges), len(leading)
        )
        for low, high in split(torch.Size(piece.shape).numel(), r):
            total += digest_of(tensor, piece, low, high)
    assert total % MODULUS == by_definition(tensor)


def _product(grids):
    if not grids:
        yield ()
        return
    for first in grids[0]:
        for rest in _product(grids[1:]):
            yield (first, *rest)


@pytest.mark.parametrize(
    "accident",
    [
        lambda t: torch.cat([t[1:], t[:1]]),
        lambda t: torch.cat([torch.zeros(64), t[:-64]]),
        lambda t: torch.cat([t[1:2], t[:1], t[2:]]),
        lambda t: torch.cat([t[:500], -t[500:501], t[501:]]),
        lambda t: torch.cat([t[:-1], torch.zeros(1)]),
        lambda t: torch.cat([t[:-1], t[-1:].nextafter(torch.tensor([torch.inf]))]),
    ],
    ids=["rotated", "shifted", "swapped", "sign", "lost", "last_bit"],
)
def test_every_kind_of_corruption_changes_the_digest(accident):
    torch.manual_seed(0)
    tensor = torch.randn(1000)
    piece = Piece("w", (1000,), (0,), (1000,), 0)
    assert digest_of(accident(tensor), piece, 0, 1000) != digest_of(tensor, piece, 0, 1000)
