"""Refuses numbers that no model can have, by the name of their tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_g2rl.policy.hf.tensor_folder import WeightsError

_AT_ONCE = 2**22
"""Numbers looked at together: what that takes is little beside a tensor."""


def refuse_lost_numbers(tensor: Tensor, name: str, where: object, dtype: torch.dtype | None = None) -> None:
    """Refuse a tensor with numbers that are not finite, or would not be after a conversion.

    Args:
        tensor: any shape.
        name: of the tensor, for the message.
        where: its folder, for the message.
        dtype: what it is converted to; None: it stays as it is.

    Raises:
        WeightsError: names the tensor, the first such number and its place.
    """
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), _AT_ONCE):
        part = flat[start : start + _AT_ONCE]
        finite = part.isfinite()
        if not finite.all():
            place = start + int((~finite).nonzero()[0])
            raise WeightsError(
                f"{where}: tensor {name!r} holds {float(flat[place])} at {_index(tensor, place)}: no model can be used "
                "with such a weight; download or copy it again, or take an earlier checkpoint"
            )
        if dtype is None or dtype.itemsize >= tensor.dtype.itemsize and dtype != torch.float16:
            continue
        kept = part.to(dtype).isfinite()
        if not kept.all():
            place = start + int((~kept).nonzero()[0])
            limit = torch.finfo(dtype).max
            raise WeightsError(
                f"{where}: tensor {name!r} holds {float(flat[place]):g} at {_index(tensor, place)}, beyond {limit:g}, "
                f"the largest number of {str(dtype).removeprefix('torch.')}: choose another --dtype (bf16 has the "
                "range of fp32)"
            )


def _index(tensor: Tensor, place: int) -> list[int]:
    return [int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape)]
