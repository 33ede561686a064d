"""Runs a function on several ranks: processes forked from one that has imported Megatron (0.3 s, not 6 s)."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from megatron_g2rl.distributed.ranks import reserve_port

if TYPE_CHECKING:
    import torch


def _rank_main(rank: int, world: int, port: int, folder: str, function: Callable, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        outcome = True, _pickled(function(rank, *args))
    except BaseException:
        outcome = False, _pickled(traceback.format_exc())
    Path(folder, f"{rank}.new").write_bytes(outcome[1])
    Path(folder, f"{rank}.new").rename(_result(folder, rank, outcome[0]))
    sys.stdout.flush()
    # Others may still be connecting to this rank, or waiting for the end of a collective.
    deadline = time.monotonic() + 300
    while outcome[0] and not getattr(function, "leaves_early", False) and time.monotonic() < deadline:
        if all(_result(folder, peer).exists() for peer in range(world)):
            break
        time.sleep(0.01)
    # _exit skips the handlers that would end helper processes (dist_checkpointing's manager).
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)


@functools.cache
def _inherited() -> None:
    """Import what the children inherit; their garbage collections skip it, so that its pages stay shared."""
    import megatron_g2rl.policy.checkpoint.checkpoints
    import megatron_g2rl.policy.checkpoint.save
    import megatron_g2rl.policy.policy  # noqa: F401

    gc.collect()
    gc.freeze()


def run_ranks(world: int, function: Callable, *args, timeout_s: float = 300.0) -> list:
    """Call `function(rank, *args)` in `world` processes that can form one process group; returns their results by rank.

    A process exits when all have finished, or immediately if `function.leaves_early` is set.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or did not finish in `timeout_s`.
    """
    _inherited()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder, reserve_port() as reserving:
        shared = (world, reserving.getsockname()[1], folder, function, args)
        ranks = [context.Process(target=_rank_main, args=(rank, *shared)) for rank in range(world)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_s
        # One failed rank leaves the others waiting in a collective: end as soon as one has failed.
        while time.monotonic() < deadline and any(p.is_alive() for p in ranks):
            if any(_result(folder, r, False).exists() for r in range(world)):
                time.sleep(0.5)
                break
            time.sleep(0.02)
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
        outcomes = [_outcome(folder, r) for r in range(world)]
    errors = [f"rank {r}:\n{o[1]}" for r, o in enumerate(outcomes) if o is not None and not o[0]]
    silent = [f"rank {r} died or hung" for r, o in enumerate(outcomes) if o is None]
    assert not errors and not silent, "\n".join(errors + silent)
    return [o[1] for o in outcomes]


class _Pickler(pickle.Pickler):
    """Pickles plain tensors as arrays: torch's own pickling of each tensor took a sixth of the tests' time."""

    def reducer_override(self, value: object) -> object:
        import torch

        if type(value) is not torch.Tensor or value.requires_grad or value.layout is not torch.strided:
            return NotImplemented
        return _tensor, (value.contiguous().flatten().view(torch.uint8).numpy(), value.dtype, value.shape)


def _pickled(value: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _tensor(array: numpy.ndarray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    import torch

    return torch.from_numpy(array).view(dtype).reshape(shape)


def _result(folder: str, rank: int, succeeded: bool = True) -> Path:
    """The file of what a rank returned, or of the traceback of its exception."""
    return Path(folder, f"{rank}.{'returned' if succeeded else 'raised'}")


def _outcome(folder: str, rank: int) -> tuple[bool, object] | None:
    """Whether the rank succeeded, and what it returned or the traceback; None if it did neither."""
    for succeeded in (True, False):
        with contextlib.suppress(FileNotFoundError):
            return succeeded, pickle.loads(_result(folder, rank, succeeded).read_bytes())
    return None
