"""Runs `g2rl` in a process forked from this one, which has everything imported: 0.3 s, not 7 s.

tests/integration/test_errors.py and the fuzzer share it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RAISED = 98
"""Exit code of a command that let an exception through."""
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Outcome:
    """What the user saw of a command."""

    code: int
    """Exit code; negative: the signal that ended it."""
    text: str
    """Standard output and standard error together."""
    seconds: float
    stopped: str = ""
    """Why it was killed from here, empty if it was not."""


def preload() -> None:
    """Import what a command imports, so that forked children inherit it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron's of packages that are optional
        import megatron_g2rl.cli
        import megatron_g2rl.doctor
        import megatron_g2rl.policy.hf.convert
        import megatron_g2rl.report
        import megatron_g2rl.trainer  # noqa: F401


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
    """Run `g2rl ARGUMENTS` in a forked process that leads a session of its own.

    Args:
        arguments: of the command, without its name.
        folder: working folder.
        output: file for what it prints.
        limit_s: seconds until it is killed.
        environment: variables to set; None: to remove.
        before: called in the new process before the command.
        watch: called about ten times a second; the command is killed when it returns a reason.
    """
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _become_command(arguments, folder, output, environment or {}, before)
    stopped, looked = "", start
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        now = time.monotonic()
        if watch and now > looked + 0.1:
            stopped, looked = watch(), now
        if now > start + limit_s:
            stopped = f"no end after {limit_s:g} s"
        if stopped:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.01)
    text = output.read_text(errors="backslashreplace") if output.exists() else ""
    return Outcome(os.waitstatus_to_exitcode(status), text, time.monotonic() - start, stopped)


def _become_command(arguments, folder, output, environment, before) -> None:
    code = 99
    try:
        os.setsid()
        descriptor = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(descriptor, 1), os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)
        # As the interpreter sets it up: what cannot be encoded is escaped.
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
        os.chdir(folder)
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        sys.argv = ["g2rl", *arguments]
        from megatron_g2rl.cli import main

        try:
            if before:
                before()
            main()
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 0 if ending.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = RAISED
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
