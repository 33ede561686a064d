"""Parent-side handle of a reward worker process: its jobs, its deadline, and how it is stopped."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from signal import SIGKILL
from typing import Any

import psutil

MEMORY_BYTES = 4 * 2**30
"""Memory one worker may allocate."""
START_S = 120.0
"""Time limit in seconds for a worker to start, import the reward functions and set them up."""


@dataclass(eq=False)
class WorkerProcess:
    """Parent-side handle of a worker process."""

    setup: list[dict[str, Any]]
    """Functions to load."""
    starting: bool = True
    jobs: deque[int] = field(default_factory=deque)
    """Jobs that were sent and have no result yet."""
    together: bool = False
    """Whether it works on all jobs concurrently; otherwise on the first."""
    deadline_s: float = math.inf
    """Time limit in seconds of the current call."""
    due: float = 0.0
    """Monotonic time at which the current call, or the start, exceeds its limit."""
    process: subprocess.Popen = field(init=False)
    connection: Connection = field(init=False)

    def __post_init__(self) -> None:
        ours, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(MEMORY_BYTES), str(os.getpid())]
        # The worker searches modules in the same folders as this process and, last, in the current one (-P: not first).
        folders = [*(entry or os.getcwd() for entry in sys.path), os.getcwd()]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "megatron_g2rl.rewards.worker", *arguments],
                stdin=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        self.connection = Connection(ours.detach())
        self.due = time.monotonic() + START_S
        self.send(self.setup)

    @property
    def idle(self) -> bool:
        """Whether it waits for work."""
        return not self.starting and not self.jobs

    def give(self, jobs: list[int], work: dict[str, Any], together: bool, deadline_s: float) -> None:
        """Send the calls of `jobs`."""
        self.jobs.extend(jobs)
        self.deadline_s, self.together = deadline_s, together
        self.send(work)
        self.due = time.monotonic() + deadline_s

    def send(self, message: Any) -> None:
        """Send a message; the death of a worker is detected at the next read."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(json.dumps(message).encode())

    def is_stopped(self) -> bool:
        """Whether a signal stopped (suspended) it."""
        return self.process.poll() is None and psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED

    def reap(self) -> int:
        """Exit code of a worker that has ended; also kills processes of its session."""
        # Kill before wait(): afterwards the process id may be reused.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, SIGKILL)
        return self.process.wait()

    def kill(self) -> None:
        """Kill it and all processes that it started."""
        self.connection.close()
        if self.process.poll() is None:
            # It leads its own session; descendants that started another session are killed individually.
            started = _descendants(self.process.pid)
            os.killpg(self.process.pid, SIGKILL)
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
