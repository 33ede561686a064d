"""Runs a function on several ranks: processes forked from one that has imported Megatron (0.3 s, not 6 s)."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from random_models import write_random_model

from megatron_g2rl.distributed.ranks import reserve_port

os.environ.setdefault("OMP_NUM_THREADS", "1")


def _rank_main(rank: int, world: int, port: int, folder: str, function: Callable, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        outcome = (True, function(rank, *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    Path(folder, f"{rank}.pkl").write_bytes(pickle.dumps(outcome))
    sys.stdout.flush()
    # Others may still be connecting to this rank, or waiting for the end of a collective.
    deadline = time.monotonic() + 300
    while outcome[0] and not getattr(function, "leaves_early", False) and time.monotonic() < deadline:
        if all(Path(folder, f"{peer}.pkl").exists() for peer in range(world)):
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
            failed = [_outcome(folder, r) for r in range(world)]
            if any(o is not None and not o[0] for o in failed):
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


def _outcome(folder: str, rank: int) -> tuple | None:
    try:
        return pickle.loads(Path(folder, f"{rank}.pkl").read_bytes())
    except (FileNotFoundError, EOFError, pickle.UnpicklingError):
        return None


@pytest.fixture(scope="session")
def ranks() -> Callable:
    """The function `run_ranks`."""
    return run_ranks


VOCABULARY = 307
"""Deliberately no round number, so that every test has padded rows."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Callable[[str, bool], str]:
    """(family, tied) -> folder of a random model, created once."""
    made: dict[tuple[str, bool], str] = {}

    def get(family: str, tied: bool) -> str:
        key = (family, tied)
        if key not in made:
            made[key] = write_random_model(
                tmp_path_factory.mktemp(f"{family}_{tied}"),
                family,
                seed=3,
                noise=0.2,
                vocab_size=VOCABULARY,
                intermediate_size=96,
                num_hidden_layers=4,
                rope_parameters=dict(rope_type="default", rope_theta=1e6),
                initializer_range=0.08,
                tie_word_embeddings=tied,
            )
        return made[key]

    return get
