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
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from megatron_g2rl.distributed.collectives import gather, on_all_ranks, own_rank
from megatron_g2rl.errors import UserError

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
    outcomes = on_all_ranks(lambda: (fetcher, fetch() if fetcher == own_rank() else None))
    return [outcomes[first][1] for first, _ in outcomes]


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
    markers = gather(marker and marker.name)
    seen = (other for other, name in enumerate(markers) if name and (cache / name).exists())
    fetcher = next(seen, rank)
    dist.barrier()  # all ranks have checked the markers
    if marker is not None:
        marker.unlink(missing_ok=True)
    return fetcher


def fetch_model(name: str, label: str) -> Path:
    """Folder of a model: `name` itself, or the download of a Hub model of that name; a collective.

    Args:
        name: folder or Hub name.
        label: the model in messages.

    Raises:
        UserError: it is not a folder and the download failed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder

    def fetch() -> str | None:
        try:
            snapshot_download(name)
        except (OSError, ValueError, HfHubHTTPError) as error:
            return _not_fetched(error)

    problems = fetch_once(Path(constants.HF_HUB_CACHE), fetch)
    if problem := next(filter(None, problems), None):
        raise UserError(f"{label} is not a folder (relative paths start at {Path.cwd()}), and {problem}")
    return Path(snapshot_download(name, local_files_only=True))


def _not_fetched(error: Exception) -> str:
    """Why the download of a model failed, and how to fix it."""
    if isinstance(error, RepositoryNotFoundError):  # also raised for gated models
        return (
            "the Hugging Face Hub has no model of that name that you can access. Correct the name, or log in with "
            "`hf auth login`"
        )
    if isinstance(error, LocalEntryNotFoundError):  # not in the cache either
        cause = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
        return (
            f"the Hugging Face Hub cannot be reached ({cause}). Pass a local folder, fix the network, or download the "
            "model on a connected machine: hf download NAME --local-dir FOLDER"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"the download from the Hugging Face Hub failed ({reason}). Pass a local folder or fix the error above"
