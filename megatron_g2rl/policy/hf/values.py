"""Refuses tensors with non-finite numbers, naming the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_g2rl.policy.hf.tensor_folder import WeightsError

_BLOCK = 2**22
"""Elements checked at a time, to keep temporary memory small compared to a tensor."""


def refuse_lost_numbers(tensor: Tensor, name: str, where: object, dtype: torch.dtype | None = None) -> None:
    """Refuse a tensor with numbers that are not finite, or would not be after a conversion.

    Args:
        tensor: any shape.
        name: name of the tensor, for the message.
        where: folder of the tensor, for the message.
        dtype: dtype that it is converted to; None: no conversion.

    Raises:
        WeightsError: names the tensor, the first such number and its index.
    """
    flat = tensor.detach().reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        part = flat[start : start + _BLOCK]
        finite = part.isfinite()
        if not finite.all():
            position = start + int((~finite).nonzero()[0])
            raise WeightsError(
                f"{where}: tensor {name!r} contains {float(flat[position])} at {_index(tensor, position)}: a model "
                "with such a weight is unusable; download or copy it again, or use an earlier checkpoint"
            )
        if dtype is None or dtype.itemsize >= tensor.dtype.itemsize and dtype != torch.float16:
            continue
        representable = part.to(dtype).isfinite()
        if not representable.all():
            position = start + int((~representable).nonzero()[0])
            limit = torch.finfo(dtype).max
            raise WeightsError(
                f"{where}: tensor {name!r} contains {float(flat[position]):g} at {_index(tensor, position)}, beyond "
                f"{limit:g}, the largest number of {str(dtype).removeprefix('torch.')}: choose another --dtype (bf16 "
                "has the range of fp32)"
            )


def _index(tensor: Tensor, position: int) -> list[int]:
    return [int(i) for i in torch.unravel_index(torch.tensor(position), tensor.shape)]
