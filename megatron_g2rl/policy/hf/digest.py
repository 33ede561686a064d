"""Tensor digests, used to verify that a tensor was written correctly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

_BLOCK = 1 << 18


@dataclass(frozen=True)
class Digest:
    """Shape, dtype and checksum of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    xxh3: str
    """xxh3_128 of the bytes."""

    def __str__(self) -> str:
        return f"shape {self.shape}, {self.dtype}, xxh3 {self.xxh3}"


def digest(tensor: Tensor, dtype: torch.dtype | None = None) -> Digest:
    """The digest of `tensor` as `dtype`, computed block by block without copying the full tensor.

    Args:
        tensor: on the CPU.
        dtype: dtype that it is converted to first; None: its own.
    """
    dtype = dtype or tensor.dtype
    checksum = xxhash.xxh3_128()
    for block in tensor.detach().contiguous().view(-1).split(_BLOCK):
        checksum.update(block.to(dtype).view(torch.uint8).numpy())
    return Digest(tuple(tensor.shape), dtype, checksum.hexdigest())
