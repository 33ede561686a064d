"""Rendezvous of the ranks of a run, with a timeout of a minute and a check that the port belongs to this run.

The store of another run responds on its port, too. Ranks therefore use a key that identifies their run, and report
which ranks are missing instead of waiting for half an hour.
"""

from __future__ import annotations

import hashlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megatron_g2rl.errors import UserError

TIMEOUT_VARIABLE = "G2RL_RENDEZVOUS_SECONDS"
"""Environment variable: seconds that ranks wait for each other."""
DEFAULT_S = 60.0
ALONE = "G2RL_ALONE"
"""Environment variable: process id of a single rank without a launcher, which needs no port."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def meet(identity: str) -> dist.Store:
    """Wait until all ranks have connected (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); returns their common store.

    Args:
        identity: identifies the run; ranks with a different value belong to another run.

    Raises:
        UserError: the port is in use, there is no response, or ranks are missing (the message names them).
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get(ALONE) == str(os.getpid()):
        return dist.HashStore()
    seconds = float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_S))
    step = os.environ.get("SLURM_STEP_ID", os.environ.get("TORCHELASTIC_RUN_ID", ""))
    key = hashlib.blake2b(f"{identity}|{step}|{world}".encode(), digest_size=8).hexdigest()
    deadline = time.monotonic() + seconds
    store = dist.PrefixStore(key, _open(rank, seconds))
    if store.add(f"rank {rank}", 1) > 1:
        raise UserError(f"{_who()} was started twice: another process of this run also has RANK={rank}")
    store.set(f"host {rank}", socket.gethostname())
    if rank == 0:
        _wait_for_all(store, world, deadline, seconds)
        store.set("all are there", "1")
    else:
        try:
            # Rank 0 reports the missing ranks; the others wait a little longer, so that it has time to.
            store.wait(["all are there"], timedelta(seconds=max(deadline - time.monotonic(), 0) + 5))
        except (dist.DistStoreError, dist.DistNetworkError, RuntimeError):
            raise UserError(
                f"{_who()} found no rank 0 of its run at {_where()} in {seconds:.0f} s: another run uses that port, or "
                "rank 0 has ended; check its last message, or set MASTER_PORT to a free port"
            ) from None
    return store


def _wait_for_all(store: dist.Store, world: int, deadline: float, seconds: float) -> None:
    missing = list(range(world))
    while missing := [rank for rank in missing if not store.check([f"host {rank}"])]:
        if time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:20])) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
            raise UserError(
                f"{len(missing)} of {world} ranks did not connect to {_where()} in {seconds:.0f} s: rank {shown}. "
                f"Start all ranks at the same time with the same configuration; set {TIMEOUT_VARIABLE} to wait longer"
            )
        time.sleep(0.05)


def _open(rank: int, seconds: float) -> dist.Store:
    """The store on MASTER_ADDR; rank 0 hosts it, unless torchrun does."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        raise UserError(f"{_who()} cannot join the others at {_where()}: set both on every rank")
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = rank == 0 and not agent
    listening = _listen(port) if hosts and host in _LOOPBACK else None
    options = dict(is_master=hosts, timeout=timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True)
    if listening is not None:
        options["master_listen_fd"] = listening.detach()
    make = lambda: dist.TCPStore(host, int(port), **options)  # noqa: E731
    try:
        # The host always reaches its own store; only a client can connect to an unrelated server.
        store = make() if hosts else _with_time_limit(make, seconds + 5)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError, RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error):
            why = "another process uses that port; set MASTER_PORT to a free one (torchrun: --master-port)"
        else:
            why = f"{str(error).splitlines()[0]}; check MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE of every rank"
        raise UserError(f"{_who()} cannot join the others at {_where()}: {why}") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt {attempt}", store)


def _with_time_limit(work: Callable[[], dist.Store], seconds: float) -> dist.Store:
    """Run `work` with a time limit: it blocks if the server accepts connections but never answers.

    Raises:
        TimeoutError: it took longer.
        Exception: whatever `work` raises.
    """
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def attempt() -> None:
        try:
            outcome.put((work(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=attempt, daemon=True).start()
    try:
        store, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("the server there is not the store of a run: another program uses that port") from None
    if error is not None:
        raise error
    return store


def _listen(port: str) -> socket.socket:
    """A socket on the loopback interface only: ranks on one machine need no other interface to reach the store."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", int(port)))
    except (OSError, OverflowError, ValueError) as error:
        listening.close()
        raise UserError(
            f"{_who()} cannot join the others at {_where()}: another process uses that port ({error}); set MASTER_PORT "
            "to a free one (torchrun: --master-port)"
        ) from error
    listening.listen(1024)
    return listening


def _who() -> str:
    return f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}"


def _where() -> str:
    host = os.environ.get("MASTER_ADDR", "MASTER_ADDR, which is not set")
    return f"{host}:{os.environ.get('MASTER_PORT', 'MASTER_PORT (not set)')}"
