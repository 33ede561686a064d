"""Runs of a sweep on this machine, one after the other, in the foreground; the same command again resumes."""

from __future__ import annotations

import fcntl
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from g2rl_launch.run import LaunchedRun
from g2rl_launch.submit import CALLER
from megatron_g2rl.config.run_files import STOPPED
from megatron_g2rl.errors import Interrupted

_LOCK = "sweep.lock"
"""File in the launch folder that is locked while the run is running."""


def run_here(runs: Mapping[str, tuple[LaunchedRun, Sequence[str]]], say: Callable[[str], None]) -> None:
    """Run them, given by name with the arguments of `g2rl`; `say` is called with each status line.

    Each logs to `launch/log-N-0.out` in its folder, where its outcome is also recorded. SIGTERM and Ctrl-C let the
    current run save, and end the sweep with Interrupted.
    """
    for name, (run, arguments) in runs.items():
        folder = Path(run.launch_folder)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("a") as lock:
            with suppress(OSError):  # of file systems without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "outcome").unlink(missing_ok=True)
            log = folder / f"log-{len([*folder.glob('log-*.out')]) + 1}-0.out"
            say(f"{name}: started, its output is in {log}")
            code, signaled = _run([CALLER, "-m", "megatron_g2rl.cli", *arguments], log, lock.fileno())
            word = {0: "finished", STOPPED: "stopped"}.get(code, "failed")
            (folder / "outcome").write_text(f"{word} {code}\n")
            say(f"{name}: {word}" + (f" ({code})" if code else ""))
        if signaled:
            raise Interrupted("the sweep was stopped; the same command resumes it")


def is_running(run: LaunchedRun) -> bool:
    """Whether the run is running on this machine, also if it outlived its sweep."""
    with suppress(FileNotFoundError), (Path(run.launch_folder) / _LOCK).open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass  # a file system without locks
    return False


def _run(command: Sequence[str], log: Path, lock: int) -> tuple[int, bool]:
    """Run a command with its output in a log; its exit code, and whether a signal asked it to stop.

    It inherits the lock, so that the next sweep waits for a run that outlived a killed sweep.
    """
    signaled = False
    # In a new session, so that Ctrl-C reaches it only once, as SIGTERM.
    with log.open("a") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[lock], start_new_session=True
        )

    def stop(*_: object) -> None:
        nonlocal signaled
        signaled = True
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait(), signaled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
