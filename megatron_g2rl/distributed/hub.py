"""Downloads from the Hugging Face Hub once for all ranks that share a cache; the other ranks wait and read the files.

If every rank of a large run sends a request at the same time, the Hub refuses them, and a cache in a home folder that
all nodes mount is slow. Which ranks share a cache is tested with marker files, because names and paths do not show it.
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

    The other ranks wait as long as needed: `policy.runtime` sets no short timeout for object collectives.

    Args:
        cache: the folder that `fetch` fills; the same path on every rank.
        fetch: performs the download; returns expected errors instead of raising them, and its result can be pickled.

    Returns:
        For every rank, in rank order, the result of the rank that fetched for it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [fetch()]
    fetcher = _fetcher(cache)
    outcome = fetch() if fetcher == dist.get_rank() else None
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (fetcher, outcome))
    return [gathered[first][1] for first, _ in gathered]


def own_rank() -> int:
    """Global index of this rank; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def _fetcher(cache: Path) -> int:
    """The first rank whose marker file in `cache` this rank sees; a collective.

    The first rank of each machine writes a marker. A rank that cannot write one and sees none fetches for itself.
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
    dist.barrier()  # all ranks have checked the markers
    if marker is not None:
        marker.unlink(missing_ok=True)
    return fetcher
