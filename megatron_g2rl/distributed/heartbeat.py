"""Ends the run and names the rank when a rank's process no longer runs although its connections stay open.

A process that is stopped (SIGSTOP, a frozen container), or whose machine is lost, closes no connection: the other ranks
would wait for it in a collective until that times out, with a message that names no rank. To detect this, a thread of
every rank increments a counter in the store of the process group. Rank 0 monitors all counters; the other ranks monitor
rank 0's counter and whether the store, which rank 0 hosts, responds. A rank that is merely slow, for example in a
rollout of hours, keeps counting.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

import psutil
import torch.distributed as dist

from megatron_g2rl.distributed.environment import seconds_variable
from megatron_g2rl.distributed.rank_reports import write_exit_code, write_message, write_silent_rank

SILENCE_VARIABLE = "G2RL_SILENT_RANK_SECONDS"
"""Environment variable: seconds that a rank may be silent; `inf` disables the check, e.g. for a debugger."""
DEFAULT_S = 300.0
BEAT_S = 5.0
"""Longest interval between two heartbeats, seconds."""


OnSilence = Callable[[int, str], None]
"""Called with the silent rank and the message."""


class Heartbeat:
    """Sends this rank's heartbeat and monitors other ranks, in two threads, until `stop`; no-op with a single rank."""

    def __init__(self, on_silence: OnSilence | None = None) -> None:
        """Start; torch.distributed must be initialized, and every rank must start one.

        Args:
            on_silence: called to end this process; by default it reports the message, kills the silent
                rank if it is on this machine, and exits.

        Raises:
            UserError: the environment variable is not a number above 0.
        """
        self._seconds = seconds_variable(SILENCE_VARIABLE, DEFAULT_S, math.inf, "or inf")
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._on_silence = on_silence or self._end_process
        self._stopped = threading.Event()
        self._locations: dict[int, str] = {}
        self._rounds = 0
        """Completed rounds of the counting thread."""
        self._threads: list[threading.Thread] = []
        if self._world == 1:
            return
        # A separate connection: the main thread may be blocked on its own.
        self._store = dist.PrefixStore("heartbeat", dist.distributed_c10d._get_default_store().clone())
        self._beat_s = min(BEAT_S, self._seconds / 5)
        self._watched = [rank for rank in (range(self._world) if self._rank == 0 else (0,)) if rank != self._rank]
        process = psutil.Process()
        self._store.set(f"place {self._rank}", f"{socket.gethostname()} {process.pid} {process.create_time()}")
        for work in (self._count, self._guard):
            self._threads.append(threading.Thread(target=work, daemon=True, name=f"heartbeat {work.__name__}"))
            self._threads[-1].start()

    def __enter__(self) -> Heartbeat:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the threads; after this the ranks may end one after another."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(2 * BEAT_S)

    def _count(self) -> None:
        """Set this rank's counter and read the monitored ones, once per beat; ends when the store ends with rank 0."""
        # Time is measured in beats of this process: a process that was itself suspended must not report others.
        last, silent, count = dict.fromkeys(self._watched, b""), dict.fromkeys(self._watched, 0), 0
        try:
            while not self._stopped.wait(self._beat_s):
                count += 1
                self._store.set(f"beat {self._rank}", str(count))
                for rank in self._watched:
                    key = f"beat {rank}"
                    beat = self._store.get(key) if self._store.check([key]) else b""
                    silent[rank] = silent[rank] + 1 if beat == last[rank] else 0
                    last[rank] = beat
                    if rank not in self._locations and self._store.check([f"place {rank}"]):
                        self._locations[rank] = self._store.get(f"place {rank}").decode()
                self._rounds += 1
                self._report([rank for rank in self._watched if silent[rank] * self._beat_s > self._seconds])
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError):
            self._stopped.set()  # the rank that hosts the store has ended; the cause is reported elsewhere

    def _guard(self) -> None:
        """Monitor the counting thread: it blocks in a store call when the process that hosts the store is stopped."""
        before, beats = -1, 0
        while not self._stopped.wait(self._beat_s):
            beats = beats + 1 if self._rounds == before else 0
            before = self._rounds
            if self._rank != 0 and beats * self._beat_s > self._seconds:
                self._report([0])

    def _report(self, ranks: list[int]) -> None:
        if not ranks or self._stopped.is_set():
            return
        self._stopped.set()
        where = [f"rank {rank}{self._location(rank)}" for rank in ranks[:8]] + ["and more"] * (len(ranks) > 8)
        self._on_silence(
            ranks[0],
            f"{', '.join(where)} did not run for {self._seconds:.0f} s: its process is suspended, or its machine is "
            f"suspended or lost. The same command resumes from the latest checkpoint; set {SILENCE_VARIABLE} to wait "
            "longer",
        )

    def _location(self, rank: int) -> str:
        if rank not in self._locations:
            return ""
        host, pid, _ = self._locations[rank].split()
        return f" (process {pid} on {host})"

    def _end_process(self, silent: int, message: str) -> None:
        """Report `message` as `g2rl train` reports errors, kill the silent rank if it is on this machine, and exit.

        The main thread is blocked in a collective that no exception can interrupt.
        """
        try:
            if not write_message(message):
                print(message if self._rank == 0 else f"rank {self._rank}: {message}", file=sys.stderr, flush=True)
            write_silent_rank(silent)
            write_exit_code(1)
            host, pid, created = self._locations.get(silent, "? 0 0").split()
            if host == socket.gethostname():
                _kill(int(pid), float(created))
        finally:
            os._exit(1)


def _kill(pid: int, created: float) -> None:
    """Kill process `pid` if it was created at `created`; a stopped process reacts to no other signal."""
    try:
        if psutil.Process(pid).create_time() == created:
            os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return
