"""Runs on this machine (`executor: local`): one that is watched, or those of a sweep; known by the locks they hold."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from g2rl_launch import registry, submission
from g2rl_launch.command import Launch
from g2rl_launch.job import new_launch_id
from g2rl_launch.runs import LaunchedRun
from g2rl_launch.sbatch import render
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.errors import UserError


def run_here(launch: Launch, say: Callable[[str], None]) -> LaunchedRun:
    """Run it and show what it says; returns when it is over. Through nemo-run where that is installed.

    SIGTERM and Ctrl-C stop the run too: it saves, and the same command goes on.

    Args:
        launch: the run.
        say: told when it is to stop.

    Raises:
        UserError: it is under way already, files are not committed, secrets are missing, or nemo-run failed.
    """
    try:
        submission.launch_python()
    except ConfigError:
        process = start_here(launch, shown=True)
        with stopping_on_request(partial(stop_all, {launch.job.name: process}, say)):
            process.wait()
        return launch.run
    run = launch.prepare()
    before = registry.remembered(run.name)
    registry.remember(run)  # before it is over: others ask how it stands
    with stopping_on_request(partial(_stop_held, run, say)):
        try:
            submission.submit(submission.request_of(launch.job, new_launch_id(run.name)))
        except UserError:
            registry.remember(before) if before else registry.forget(run.name)
            raise
    return run


def start_here(launch: Launch, shown: bool = False) -> subprocess.Popen:
    """Start a run's script on this machine; it and all that it starts hold the run's lock.

    Args:
        launch: the run.
        shown: say here what it says, instead of in a file.
    """
    run = launch.prepare()
    folder = Path(run.launch_folder)
    folder.mkdir(parents=True, exist_ok=True)
    registry.remember(run)
    script = folder / "job.sh"
    script.write_text(render(launch.job, new_launch_id(run.name)), encoding="utf-8")
    with (folder / "local.lock").open("a") as lock, (folder / "script.out").open("a") as output:
        with suppress(OSError):  # of file systems without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        return subprocess.Popen(
            ["bash", str(script)],
            stdout=None if shown else output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=[lock.fileno()],
            start_new_session=True,
            env=os.environ | {"G2RL_LOCKED": "1"},
        )


@contextmanager
def stopping_on_request(stop: Callable[[], None]) -> Iterator[None]:
    """On SIGTERM and Ctrl-C, stop what was started."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        stop()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_all(started: Mapping[str, subprocess.Popen], say: Callable[[str], None]) -> None:
    """Tell started runs to stop and wait until they have saved."""
    alive = {name: process for name, process in started.items() if process.poll() is None}
    say(f"stopping {', '.join(alive) or 'nothing'}; the same command goes on")
    for process in alive.values():
        os.killpg(process.pid, signal.SIGTERM)
    for process in alive.values():
        process.wait()


def _stop_held(run: LaunchedRun, say: Callable[[str], None]) -> None:
    say(f"stopping {run.name}; the same command goes on")
    run.stop_here()
    while run.is_held():
        time.sleep(0.2)
