"""Makes this process a rank, or starts the ranks of a run on this machine if no launcher did.

A single rank runs in this process; several ranks are started by torchrun in a child process, and signals and the exit
code are passed through. Several machines need a launcher (torchrun on each, or srun) that starts `g2rl train` itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from megatron_g2rl.config.world import launched_world_size
from megatron_g2rl.distributed import environment
from megatron_g2rl.distributed.orphans import adopt_orphans, signal_when_parent_ends
from megatron_g2rl.distributed.rank_reports import EXIT_CODE_FILE, print_other_ranks_messages
from megatron_g2rl.errors import UserError

SHUTDOWN_TIMEOUT_S = 600
"""Seconds that torchrun gives ranks to save after a signal; its own default, 30, is too short for a large model."""

SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""torchrun's environment variable for this timeout."""

POLL_S = 5.0
"""Seconds between two checks whether torchrun or a rank is stopped (SIGSTOP)."""

FIRST_REPORT_S = 10.0
"""Seconds that other ranks give rank 0 to report a configuration error first."""

LAUNCHER = "G2RL_LAUNCHER"
"""Environment variable: process id of the parent, which may have ended before this process can query it."""

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

log = logging.getLogger(__name__)


def become_rank(device: str = "auto", run_folder: Path | None = None) -> None:
    """Make this process a rank of what started it (torchrun, srun), or the only rank: set its environment variables.

    Args:
        device: `policy.device`.
        run_folder: folder of the run.
    """
    _set_place()
    environment.set_rank_variables(device, int(os.environ.get("WORLD_SIZE", "1")), run_folder)
    sys.stdout.reconfigure(line_buffering=True)  # too late for PYTHONUNBUFFERED


def _set_place() -> None:
    """Set the environment variables from which torch.distributed reads this rank's number and the rendezvous."""
    if "RANK" in os.environ:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with(int(os.environ.get(LAUNCHER, os.getppid())))
        return
    if launched_world_size() is None:
        set_single_rank_env()
        return
    e = os.environ
    e["RANK"], e["LOCAL_RANK"], e["WORLD_SIZE"] = e["SLURM_PROCID"], e["SLURM_LOCALID"], str(launched_world_size())
    if "MASTER_ADDR" not in e:
        e["MASTER_ADDR"] = _address(first_host(e["SLURM_STEP_NODELIST"]))
    e.setdefault("MASTER_PORT", str(_port(e["SLURM_JOB_ID"], e.get("SLURM_STEP_ID", "0"))))


def _port(job: str, step: str) -> int:
    """A port derived from job and step: jobs on the same node, and steps of one allocation, must not use the same port.

    Ports from 32768 on are used by the system for outgoing connections; rollout servers use a range 6,000 above this.
    """
    return 20_000 + int.from_bytes(hashlib.blake2b(f"{job}.{step}".encode(), digest_size=4).digest(), "big") % 6_000


def end_with(parent: int) -> None:
    """Make this process save and stop when its parent ends, and kill it if that takes too long.

    Args:
        parent: process id of the process that started this one.
    """
    signal_when_parent_ends(parent, signal.SIGTERM)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(_shutdown_seconds())
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def first_host(hosts: str) -> str:
    """The first host of Slurm's compressed host list: `rack2n[007-9,12],login` -> `rack2n007`.

    Parsed here because containers do not have scontrol.
    """
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts).group()
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", name)


def _address(host: str) -> str:
    """`host`, or its address from Slurm if the name cannot be resolved."""
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        show = ["scontrol", "show", "node", "--oneliner", host]
        try:
            node = subprocess.run(show, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError):
            raise UserError(
                f"the name of the first node, {host}, cannot be resolved: set MASTER_ADDR to an address that all nodes "
                "can reach"
            ) from None
        return re.search(r"NodeAddr=(\S+)", node).group(1)
    return host


def reserve_port() -> socket.socket:
    """A socket that keeps a free port of the loopback interface for the store of a run on this machine.

    While it is open, no other program gets the port; it does not listen, so that rank 0 can (SO_REUSEADDR).
    """
    reserving = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserving.bind(("127.0.0.1", 0))
    return reserving


_reserved: socket.socket | None = None
"""Keeps the port of a single rank until the process ends."""


def set_single_rank_env() -> None:
    """Set the environment variables of torch.distributed to rank 0 of 1."""
    global _reserved
    _reserved = reserve_port()
    os.environ.update(
        G2RL_ALONE=str(os.getpid()),
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(_reserved.getsockname()[1]),
    )


def run_ranks(ranks: int, module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module *arguments` in `ranks` processes under torchrun; returns when all have ended.

    The first SIGINT, SIGTERM, SIGHUP or SIGUSR1 is forwarded as SIGTERM, so that ranks can save; the second kills them.

    Args:
        ranks: number of processes to start.
        module: module to run, as for `python -m`.
        arguments: command line of the module.

    Returns:
        The exit code that a rank wrote (`write_exit_code`), else torchrun's; 128 + the signal number if the ranks
        were killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        exit_code = Path(folder) / "exit_code"
        code = _run_torchrun(ranks, module, arguments, Path(folder))
        print_other_ranks_messages(Path(folder))
        text = exit_code.read_text() if exit_code.is_file() else ""  # empty: the disk was full
        return int(text) if text.isdecimal() else code


def ignore_stop_signals() -> None:
    """Ignore signals while this rank reports an error: torchrun sends SIGTERM when another rank failed."""
    if not {"RANK", "SLURM_PROCID"} & os.environ.keys():
        return
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)


def wait_for_first_rank() -> None:
    """Give rank 0 time to report an error that all ranks have; the launcher ends this rank after that.

    srun ends all ranks as soon as one has failed, even if rank 0 is still importing its libraries. A launcher that does
    not, or only on each node, ends the other ranks of a node when its first one has reported the error.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    local = int(local) if local.isdecimal() else 0  # an invalid variable may be the error to report
    time.sleep(FIRST_REPORT_S * (1 + local / 5))


def _outlive_ranks(module: str) -> None:
    """Wait for ranks whose torchrun was killed: they save, and hold the run's lock until they end.

    Args:
        module: the module that the ranks run; other processes they started are not waited for.
    """
    deadline = time.monotonic() + _shutdown_seconds() + 5  # each rank ends by itself, unless it is stopped (SIGSTOP)
    for orphan in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if module in orphan.cmdline():
                try:
                    orphan.wait(max(deadline - time.monotonic(), 0))
                except psutil.TimeoutExpired:
                    _kill(orphan.pid)


def _wait_for(child: subprocess.Popen, ranks: int) -> int:
    """Wait for torchrun and return its exit code.

    A stopped process (SIGSTOP) reacts only to SIGKILL: a stopped torchrun is killed once its ranks have ended, and a
    stopped rank once another rank has ended, because it could not save anyway.
    """
    checks = 0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(POLL_S)
        with contextlib.suppress(psutil.NoSuchProcess):
            torchrun = psutil.Process(child.pid)
            alive = [rank for rank in torchrun.children() if rank.status() != psutil.STATUS_ZOMBIE]
            stopped = [rank for rank in alive if rank.status() == psutil.STATUS_STOPPED]
            checks = checks + 1 if stopped and len(alive) < ranks else 0
            if torchrun.status() == psutil.STATUS_STOPPED and not alive:
                child.kill()
            for rank in stopped if checks > 1 else ():
                _kill(rank.pid)


def _shutdown_seconds() -> float:
    """Seconds that ranks have to save after they are asked to stop."""
    return float(os.environ.get(SHUTDOWN_VARIABLE, SHUTDOWN_TIMEOUT_S))


def _run_torchrun(ranks: int, module: str, arguments: Sequence[str], folder: Path) -> int:
    # Rendezvous through a file and the loopback interface; torchrun's logs are deleted with the folder.
    command = [sys.executable, "-m", "megatron_g2rl.distributed.torchrun", "--nnodes=1", f"--nproc-per-node={ranks}"]
    command += ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file", f"--rdzv-endpoint={folder / 'rendezvous'}"]
    command += ["--rdzv-id=run", "--local-addr=127.0.0.1", f"--log-dir={folder / 'torchrun'}"]
    variables = {
        **environment.RANK,
        **environment.SEVERAL_RANKS,
        SHUTDOWN_VARIABLE: str(SHUTDOWN_TIMEOUT_S),
        # torchrun's own store would listen on every interface; rank 0 hosts one (`distributed.rendezvous`).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        **os.environ,
        EXIT_CODE_FILE: str(folder / "exit_code"),
        LAUNCHER: str(os.getpid()),
    }
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in _FORWARDED}
    adopt_orphans()  # ranks whose torchrun was killed
    # In its own session the terminal's Ctrl-C does not reach it: it receives the signal once, from `forward`.
    child = subprocess.Popen([*command, "-m", module, *arguments], env=variables, start_new_session=True)

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        if len(received) == 1:
            log.warning("%s: ranks save and stop; a second signal kills them", signal.Signals(number).name)
            child.terminate()
        else:
            _kill(child.pid)
            for orphan in psutil.Process().children():
                _kill(orphan.pid)

    try:
        for number in _FORWARDED:
            signal.signal(number, forward)
        code = _wait_for(child, ranks)
        _outlive_ranks(module)
    finally:
        if child.poll() is None:
            _kill(child.pid)
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def _kill(pid: int) -> None:
    """Kill a process and all its descendants: torchrun puts every rank into its own session."""
    try:
        family = psutil.Process(pid)
        members = [*family.children(recursive=True), family]
    except psutil.NoSuchProcess:
        return
    for member in members:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
