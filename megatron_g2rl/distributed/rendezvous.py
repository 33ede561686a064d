"""How the ranks of a run find each other: within a minute, on a port that may be somebody else's, or not at all.

Whoever hosts the store of another run answers on its port, too. Ranks therefore meet under a key that names their run,
and say who is missing instead of waiting for half an hour.
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
"""Environment variable: how long ranks wait for each other."""
DEFAULT_S = 60.0
ALONE = "G2RL_ALONE"
"""Environment variable: id of a process that no launcher started, which is the only rank and needs no port."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def meet(identity: str) -> dist.Store:
    """Wait until all ranks are there (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); the store they share.

    Args:
        identity: names the run; ranks with another one belong to another run.

    Raises:
        UserError: the port is taken, nobody answers, or ranks are missing: they are named.
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
        raise UserError(f"{_who()} is there twice: another process of this run calls itself rank {rank}, too")
    store.set(f"host {rank}", socket.gethostname())
    if rank == 0:
        _wait_for_all(store, world, deadline, seconds)
        store.set("all are there", "1")
    else:
        try:
            # Rank 0 says who is missing; the others leave when it has had the time to.
            store.wait(["all are there"], timedelta(seconds=max(deadline - time.monotonic(), 0) + 5))
        except (dist.DistStoreError, dist.DistNetworkError, RuntimeError):
            raise UserError(
                f"{_who()} met no rank 0 of its run at {_where()} in {seconds:.0f} s: another run uses that port, or "
                "rank 0 has ended; look at its message, or set MASTER_PORT to a free port"
            ) from None
    return store


def _wait_for_all(store: dist.Store, world: int, deadline: float, seconds: float) -> None:
    missing = list(range(world))
    while missing := [rank for rank in missing if not store.check([f"host {rank}"])]:
        if time.monotonic() > deadline:
            shown = ", ".join(map(str, missing[:20])) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
            raise UserError(
                f"{len(missing)} of {world} ranks did not come to {_where()} in {seconds:.0f} s: rank {shown}. Start "
                f"all ranks at the same time with the same configuration; {TIMEOUT_VARIABLE} waits longer"
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
        # Who hosts it finds it; only a guest can come to a stranger.
        store = make() if hosts else _bounded(make, seconds + 5)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError, RuntimeError, OSError) as error:
        if "EADDRINUSE" in str(error):
            why = "another process uses that port; set MASTER_PORT to a free one (torchrun: --master-port)"
        else:
            why = f"{str(error).splitlines()[0]}; check MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE of every rank"
        raise UserError(f"{_who()} cannot join the others at {_where()}: {why}") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt {attempt}", store)


def _bounded(work: Callable[[], dist.Store], seconds: float) -> dist.Store:
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
        raise TimeoutError("what answers there is no store of a run: another program uses that port") from None
    if error is not None:
        raise error
    return store


def _listen(port: str) -> socket.socket:
    """A socket on the loopback interface alone: ranks of one machine need no other to reach the store."""
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
