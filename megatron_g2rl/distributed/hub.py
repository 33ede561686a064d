"""Downloads from the Hugging Face hub once for all ranks that share a cache; the other ranks wait, and read files only.

A request from every rank of a large run at the same moment is refused by the hub, and slow where the cache is a home
folder that all nodes mount. Which ranks share a cache is tried out with files in it, because no name or path tells.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def fetch_once(cache: Path, fetch: Callable[[], T]) -> list[T]:
    """Run `fetch` on one rank for each separate file system that `cache` is on; a collective.

    The others wait as long as it takes: `policy.runtime` gives objects of all ranks no short time limit.

    Args:
        cache: the folder that `fetch` fills; the same path on every rank.
        fetch: downloads; raises nothing that it can foresee, and returns what can be pickled.

    Returns:
        For every rank, by number, the result of the rank that fetched for it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [fetch()]
    fetcher = _fetcher(cache)
    outcome = fetch() if fetcher == dist.get_rank() else None
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (fetcher, outcome))
    return [gathered[first][1] for first, _ in gathered]


def own_rank() -> int:
    """Number of this rank; 0 where there are no others."""
    return dist.get_rank() if dist.is_initialized() else 0


def _fetcher(cache: Path) -> int:
    """The first rank whose file in `cache` this rank sees; a collective.

    The first rank of each machine leaves a file. A rank that cannot, and sees none, fetches for itself.
    """
    rank, marker = dist.get_rank(), None
    if int(os.environ.get("LOCAL_RANK", rank)) == 0:
        with contextlib.suppress(OSError):  # the cache may be complete and read-only
            cache.mkdir(parents=True, exist_ok=True)
            marker = cache / f".g2rl-{secrets.token_hex(8)}"
            marker.touch()
    markers: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(markers, marker and marker.name)
    seen = (other for other, name in enumerate(markers) if name and (cache / name).exists())
    fetcher = next(seen, rank)
    dist.barrier()  # all have looked
    if marker is not None:
        marker.unlink(missing_ok=True)
    return fetcher
