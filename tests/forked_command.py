"""The command `g2rl` in a process forked from this one, which has everything imported: 0.3 s to start, not 7 s.

The process is a real one: a session of its own, its own output files, signals and an exit code. What a fork cannot show
is that the command imports what it needs: a few tests start an interpreter for that.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import transformers


class ForkedCommand:
    """A running `g2rl`, with the part of `subprocess.Popen`'s interface that tests need."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        folder: Path,
        output: Path,
        environment: dict[str, str],
        before: Callable[[], object] | None = None,
    ):
        """Start it.

        Args:
            arguments: after `g2rl`.
            folder: its working directory.
            output: file that gets what it writes to standard output and standard error; appended to.
            environment: all its variables.
            before: called in the new process, before the command.
        """
        import megatron_g2rl.trainer  # noqa: F401  the child inherits the imports

        self.output, self.returncode = output, None
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become_command(list(arguments), folder, output, environment, before)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit code; raises subprocess.TimeoutExpired after killing it."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired("g2rl", timeout, self.read().encode())
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill its whole session."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)

    def read(self) -> str:
        """What it has written so far."""
        return self.output.read_text(errors="replace")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def rank_environments(world: int, environment: dict[str, str]) -> list[dict[str, str]]:
    """The variables of each rank, as another launcher than ours would set them."""
    meeting = dict(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    meeting |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return [environment | meeting | dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(world)]


def _become_command(
    arguments: list[str],
    folder: Path,
    output: Path,
    environment: dict[str, str],
    before: Callable[[], object] | None,
) -> None:
    code = 99
    try:
        os.setsid()
        # What the tests' own framework has set up is not the command's.
        atexit._clear()
        logging.getLogger().handlers.clear()
        descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["g2rl", *arguments]
        if before is not None:
            before()
        from megatron_g2rl.cli import main

        # The command sets a variable for it, which is read at import.
        transformers.utils.logging.disable_progress_bar()
        try:
            main()
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 98
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
