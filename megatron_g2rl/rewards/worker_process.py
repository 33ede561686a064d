"""A worker process of the reward pool as its parent sees it: what it works on, until when, and how it is ended."""

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
"""Seconds a worker may take to start, to import the reward functions and to set them up."""


@dataclass(eq=False)
class WorkerProcess:
    """A worker process as its parent sees it."""

    setup: list[dict[str, Any]]
    """What it loads."""
    starting: bool = True
    jobs: deque[int] = field(default_factory=deque)
    """Jobs that it was given and has not answered."""
    together: bool = False
    """Whether it works on all of them at the same time; else on the first."""
    deadline_s: float = math.inf
    """Seconds that its present call may take."""
    due: float = 0.0
    """Monotonic time at which its present call, or its start, is late."""
    process: subprocess.Popen = field(init=False)
    connection: Connection = field(init=False)

    def __post_init__(self) -> None:
        ours, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(MEMORY_BYTES), str(os.getpid())]
        # The worker finds modules where this process does and, last, in the current folder (-P: not first).
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
        """Send a message; a worker that has died is noticed when it is next read from."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(json.dumps(message).encode())

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it."""
        return self.process.poll() is None and psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED

    def reap(self) -> int:
        """The exit code of a worker that has ended; what it started in its session ends now."""
        # Before its process id is given back, and may become another process's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, SIGKILL)
        return self.process.wait()

    def kill(self) -> None:
        """End it and all that it has started."""
        self.connection.close()
        if self.process.poll() is None:
            # It leads a session of its own: what a reward function started goes with it, with a session or without.
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
