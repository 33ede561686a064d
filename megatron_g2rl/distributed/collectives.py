"""Collectives of Python objects in which an error on one rank is raised on all of them, so that none waits forever.

A rank that raises alone leaves the others in their next collective until it times out. Work that can fail on some ranks
only (files, downloads, code of the user) therefore runs inside `on_first_rank` or `on_all_ranks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_g2rl.errors import UserError

T = TypeVar("T")


def on_first_rank(work: Callable[[], T], when: str = "", error: type[UserError] | None = None) -> T:
    """Run `work` on rank 0 and return its result on every rank; a collective.

    Args:
        work: called on rank 0 only; its result can be pickled.
        when: prefix of the message if `work` raises anything but a UserError.
        error: type of that error; None: an OSError is raised as it is, anything else as a RuntimeError.

    Raises:
        UserError: raised by `work`, on every rank.
    """
    result = failure = None
    if own_rank() == 0:
        try:
            result = work()
        except Exception as raised:
            failure = raised
    result, sent = broadcast((result, failure and _as_sent(failure, when or "rank 0", error)))
    _raise(sent, failure)
    return result


def on_all_ranks(work: Callable[[], T], when: str = "", error: type[UserError] | None = None) -> list[T]:
    """Run `work` on every rank and return the results of all, in rank order; a collective.

    Args:
        work: its result can be pickled.
        when: prefix of the message if `work` raises anything but a UserError; by default the rank.
        error: type of that error; None: an OSError is raised as it is, anything else as a RuntimeError.

    Raises:
        UserError: raised by `work` on some rank; every rank raises the error of the first rank that failed.
    """
    result = failure = None
    try:
        result = work()
    except Exception as raised:
        failure = raised
    outcomes = gather((result, failure and _as_sent(failure, when or f"rank {own_rank()}", error)))
    first = next((rank for rank, (_, sent) in enumerate(outcomes) if sent is not None), None)
    if first is not None:
        _raise(outcomes[first][1], failure if first == own_rank() else None)
    return [result for result, _ in outcomes]


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks of `group` (None: of all ranks) in rank order; a collective."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def gather_on_first_rank(value: T) -> list[T] | None:
    """The values of all ranks in rank order on rank 0, None on the others; a collective."""
    if not dist.is_initialized():
        return [value]
    gathered: list | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered, dst=0)
    return gathered


def scatter(values: list[T] | None) -> T:
    """This rank's entry of the list that rank 0 passes, one entry per rank; a collective."""
    if not dist.is_initialized():
        return values[0]
    received: list = [None]
    dist.scatter_object_list(received, values if dist.get_rank() == 0 else None, src=0)
    return received[0]


def broadcast(value: T, source: int = 0) -> T:
    """The value that rank `source` passes; a collective."""
    sent = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(sent, src=source)
    return sent[0]


def own_rank() -> int:
    """Global index of this rank; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def _as_sent(failure: Exception, when: str, error: type[UserError] | None) -> Exception:
    """The exception that every rank raises for `failure` of one of them."""
    if isinstance(failure, UserError) or (error is None and isinstance(failure, OSError)):
        return failure
    return (error or RuntimeError)(f"{when} ({type(failure).__name__}: {failure})")


def _raise(sent: Exception | None, failure: Exception | None) -> None:
    """Raise `sent`, if any; on the rank where the work failed, with the traceback of `failure`."""
    if failure is not None and type(failure) is type(sent):
        raise failure
    if sent is not None:
        raise sent from failure
