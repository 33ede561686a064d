"""Run `g2rl` in a process forked from this one, which has imported everything: 0.3 s instead of 7 s.

It is a real process, with its own session, output, signals and exit code. The only thing that a fork cannot test is
whether the command imports everything it needs. Used by the fuzzer and by the tests of complete runs.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RAISED = 98
"""Exit code of a command that ended with an uncaught exception."""
IMPORTED_BY_COMMANDS = (
    "megatron_g2rl.cli",
    "megatron_g2rl.commands.doctor",
    "megatron_g2rl.commands.offline_evaluation",
    "megatron_g2rl.exploration.methods.gradient",
    "megatron_g2rl.policy.hf.convert",
    "megatron_g2rl.report",
    "megatron_g2rl.rollout.transformers",
    "megatron_g2rl.training.trainer",
    "megatron_g2rl.training.warm_start",
    "torch.utils.tensorboard",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
)
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


_reserved: deque[socket.socket] = deque(maxlen=20)
"""Keep the ports of the last runs from other programs."""


@dataclass(frozen=True)
class Outcome:
    """Result of a command as the user sees it."""

    code: int
    """Exit code; negative: the signal that ended it."""
    text: str
    """Standard output and standard error combined."""
    seconds: float
    stopped: str = ""
    """Why this module killed it; empty if it did not."""


@functools.cache
def preload() -> None:
    """Import everything a command imports, so that forked children inherit it and never scan it for garbage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron warns about missing optional packages
        for name in IMPORTED_BY_COMMANDS:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


class ForkedCommand:
    """A running `g2rl`, with the part of `subprocess.Popen`'s interface that its callers need."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        output: Path,
        *,
        environment: Mapping[str, str],
        before: Callable[[], object] | None = None,
        script: Path | None = None,
    ):
        """Start `g2rl ARGUMENTS` in a new process and session.

        Args:
            arguments: arguments without the command's name.
            folder: working folder.
            output: file for its output; overwritten.
            environment: the complete environment of the command.
            before: called in the new process before the command.
            script: a Python file or folder to run instead of `g2rl`.
        """
        preload()
        self.output, self.returncode = output, None
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become_command(arguments, folder, output, environment, before, script)

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it was killed after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired("g2rl", timeout, self.read().encode())
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal if it is still running."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill its session if it is still running."""
        if self.poll() is None:
            # The session may not exist yet right after the fork.
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)

    def read(self) -> str:
        """Its output so far."""
        return self.output.read_text(errors="backslashreplace") if self.output.exists() else ""


def rank_environments(world: int, environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Environment variables of each rank, as a launcher other than torchrun sets them; of one rank: without any."""
    from megatron_g2rl.distributed.ranks import reserve_port

    if world == 1:
        return [{name: value for name, value in environment.items() if name not in LAUNCHER_VARIABLES}]
    _reserved.append(reserve_port())
    port = _reserved[-1].getsockname()[1]
    meeting = dict(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [{**environment, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def fork_ranks(
    world: int,
    arguments: Sequence[str],
    folder: Path,
    output: Path,
    environment: Mapping[str, str],
    before: Callable[[], object] | None = None,
) -> list[ForkedCommand]:
    """Start `g2rl ARGUMENTS` once for each rank, without torchrun; rank N's output goes to the file `output`.N."""
    places = rank_environments(world, environment)
    outputs = [output.with_name(f"{output.name}.{rank}") for rank in range(world)]
    return [
        ForkedCommand(arguments, folder, file, environment=place, before=before)
        for file, place in zip(outputs, places, strict=True)
    ]


def wait_for_all(ranks: Sequence[ForkedCommand], limit_s: float) -> list[int]:
    """The exit codes of ranks.

    Raises:
        subprocess.TimeoutExpired: a rank did not end within `limit_s` seconds; all are killed.
    """
    deadline = time.monotonic() + limit_s
    try:
        return [rank.wait(deadline - time.monotonic()) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def run_forked(
    arguments: Sequence[str],
    folder: Path,
    output: Path,
    *,
    limit_s: float,
    environment: Mapping[str, str | None] | None = None,
    before: Callable[[], object] | None = None,
    watch: Callable[[], str] | None = None,
) -> Outcome:
    """Run `g2rl ARGUMENTS` to its end.

    Args:
        arguments: arguments without the command's name.
        folder: working folder.
        output: file for its output.
        limit_s: seconds after which it is killed.
        environment: variables to set; a value of None removes the variable.
        before: called in the new process before the command.
        watch: called about ten times a second; the command is killed when it returns a reason.
    """
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    variables = {name: value for name, value in (variables | dict(environment or {})).items() if value is not None}
    process = ForkedCommand(arguments, folder, output, environment=variables, before=before)
    start = last_watch = time.monotonic()
    stopped = ""
    while process.poll() is None:
        now = time.monotonic()
        if watch and now > last_watch + 0.1:
            stopped, last_watch = watch(), now
        if now > start + limit_s:
            stopped = f"no end after {limit_s:g} s"
        if stopped:
            process.kill()
            break
        time.sleep(0.01)
    return Outcome(process.returncode, process.read(), time.monotonic() - start, stopped)


def _become_command(
    arguments: Sequence[str],
    folder: Path,
    output: Path,
    environment: Mapping[str, str],
    before: Callable[[], object] | None,
    script: Path | None,
) -> None:
    code = 99
    try:
        os.setsid()
        # Remove what the forking program has set up.
        atexit._clear()
        logging.getLogger().handlers.clear()
        descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)
        # As the interpreter does: characters that cannot be encoded are escaped.
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [str(script or "g2rl"), *arguments]
        import transformers

        from megatron_g2rl.cli import main

        # The command sets an environment variable for this, but transformers reads it at import.
        transformers.utils.logging.disable_progress_bar()
        try:
            if before:
                before()
            runpy.run_path(str(script), run_name="__main__") if script else main()
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = RAISED
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
