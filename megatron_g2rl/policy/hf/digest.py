"""Tensor digests, used to verify that a tensor was written correctly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

_BLOCK = 1 << 18


@dataclass(frozen=True)
class Digest:
    """Shape, dtype and checksums of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sum: float
    """Sum of all elements, in float64."""
    absolute: float
    """Sum of absolute values, in float64."""
    xxh3: str
    """xxh3_128 of the bytes: sums alone do not detect swapped elements."""

    def equals(self, other: Digest) -> bool:
        """Whether both describe the same tensor; NaN sums are equal."""
        sums = zip((self.sum, self.absolute), (other.sum, other.absolute), strict=True)
        same = all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in sums)
        return same and (self.shape, self.dtype, self.xxh3) == (other.shape, other.dtype, other.xxh3)

    def __str__(self) -> str:
        return f"shape {self.shape}, {self.dtype}, sum {self.sum}, of absolute values {self.absolute}, xxh3 {self.xxh3}"


def digest(tensor: Tensor, dtype: torch.dtype | None = None) -> Digest:
    """The digest of `tensor` as `dtype`, computed block by block without copying the full tensor.

    Args:
        tensor: on the CPU.
        dtype: dtype that it is converted to first; None: its own.
    """
    dtype, checksum, sums = dtype or tensor.dtype, xxhash.xxh3_128(), [0.0, 0.0]
    for block in tensor.detach().contiguous().view(-1).split(_BLOCK):
        block = block.to(dtype)
        checksum.update(block.view(torch.uint8).numpy())
        wide = block.double()
        sums[0] += wide.sum().item()
        sums[1] += wide.abs_().sum().item()
    return Digest(tuple(tensor.shape), dtype, *sums, checksum.hexdigest())
