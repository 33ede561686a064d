"""Runs of a sweep on this machine: started in the background, found again by the locks that they hold."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_g2rl.launch import registry
from megatron_g2rl.launch.command import Launch
from megatron_g2rl.launch.job import new_launch_id
from megatron_g2rl.launch.sbatch import render


def start_here(launch: Launch) -> subprocess.Popen:
    """Start a run's script on this machine; it and all that it starts hold the run's lock."""
    run = launch.prepare()
    folder = Path(run.launch_folder)
    folder.mkdir(parents=True, exist_ok=True)
    registry.remember(run)
    script = folder / "job.sh"
    script.write_text(render(launch.job, new_launch_id(run.name)), encoding="utf-8")
    with (folder / "local.lock").open("a") as lock, (folder / "script.out").open("a") as output:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return subprocess.Popen(
            ["bash", str(script)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=[lock.fileno()],
            start_new_session=True,
            env=os.environ | {"G2RL_LOCKED": "1"},
        )


@contextmanager
def stopping_on_request(started: Mapping[str, subprocess.Popen], say: Callable[[str], None]) -> Iterator[None]:
    """Hand SIGTERM and Ctrl-C on to the started runs and wait until they have saved."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        alive = {name: process for name, process in started.items() if process.poll() is None}
        say(f"stopping {', '.join(alive) or 'nothing'}; the same command goes on")
        for process in alive.values():
            os.killpg(process.pid, signal.SIGTERM)
        for process in alive.values():
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
