"""Reads weights so that only one data-parallel rank reads each byte that several of them need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_g2rl.distributed.collectives import gather
from megatron_g2rl.policy.hf.tensor_folder import WeightsError

T = TypeVar("T")


class SharedReading:
    """One pass over a folder of weights; every rank makes the same calls in the same order, `finish` last."""

    def __init__(self) -> None:
        self._loads: dict[dist.ProcessGroup, list[int]] = {}
        """Bytes that each rank of a group has read."""
        self._error: str | None = None

    def fill(self, target: Tensor, read: Callable[[], Tensor], group: dist.ProcessGroup | None) -> None:
        """Fill `target` on all ranks of `group`; the rank that has read least calls `read` and broadcasts the result.

        Args:
            target: contiguous, of the same shape and dtype on these ranks.
            read: returns as many elements as `target` has.
            group: ranks that call this together; None: only this rank needs it.
        """
        if group is None or dist.get_world_size(group) == 1:
            self._read(target, read)
            return
        loads = self._loads.setdefault(group, [0] * dist.get_world_size(group))
        reader = loads.index(min(loads))
        loads[reader] += target.nbytes
        if reader == dist.get_rank(group):
            self._read(target, read)
        dist.broadcast(target, src=dist.get_global_rank(group, reader), group=group)

    def attempt(self, work: Callable[[], T]) -> T | None:
        """The result of `work`; None after an error, now or before, which `finish` raises on all ranks."""
        if self._error is None:
            try:
                return work()
            except (WeightsError, OSError, EOFError) as error:
                self._error = str(error)  # other ranks may wait for this one: it makes the remaining calls
        return None

    def _read(self, target: Tensor, read: Callable[[], Tensor]) -> None:
        self.attempt(lambda: target.copy_(read().view(target.shape)))

    def finish(self) -> None:
        """Raise any rank's error on every rank; a collective over all ranks.

        Raises:
            WeightsError: something could not be read; targets are then undefined.
        """
        messages = [
            f"{error} (rank {rank})" if rank else error for rank, error in enumerate(gather(self._error)) if error
        ]
        if messages:
            raise WeightsError(messages[0])


def data_parallel_group(key: str) -> dist.ProcessGroup:
    """The ranks of a pipeline stage that hold the same part of the tensor with Megatron's name `key`."""
    if ".experts." in key:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
