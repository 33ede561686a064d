"""Run the sweeps of `sweep_file`: submit runs with their dependencies, and show the state of all of them.

On Slurm all runs are submitted immediately, and Slurm enforces the limit, unattended: the runs form `concurrency`
lanes, and in a lane each run waits for the one before it (`--dependency=afterany`), requeued or not. Lanes are
reconstructed from the queue, so no state is lost if the command is killed: the same command submits the runs that are
neither finished nor queued nor running, behind those that are. Without a cluster, runs are on this machine, one after
the other, in the foreground.

Not a job array (`--array=0-7%2`): its tasks have one name, so that segments of a chain cannot wait for each other;
nemo-run does not find the state of tasks; two arrays of one sweep share no limit.
"""

from __future__ import annotations

import fcntl
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

import yaml
from rich.table import Table

from g2rl_launch import monitor
from g2rl_launch.monitor import QueryInterval, RunStatus, look_at, poll
from g2rl_launch.run import LaunchedRun, Queue, QueuedJob, cancel, state_of
from g2rl_launch.ssh import Tunnel
from g2rl_launch.submit import CALLER, Launch, check_run
from g2rl_launch.sweep_file import load_sweep
from megatron_g2rl.config import Config
from megatron_g2rl.config.changes import changes
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.model_shape import read_model_shape
from megatron_g2rl.config.run_files import STOPPED
from megatron_g2rl.errors import Interrupted


class Sweep:
    """The runs of a sweep, each checked like a run of `g2rl launch`."""

    def __init__(self, file: Path, cluster: str | None = None):
        """Read the sweep, its configuration and its profile; `cluster` overrides the profile of the file.

        Raises ConfigError if something is invalid; the message names the run if only that run is affected.
        """
        settings, points = load_sweep(file)
        cluster = cluster or settings.cluster
        if cluster and settings.concurrency is None:
            raise ConfigError(f"{file}: concurrency is missing; set it to the maximum number of concurrent runs")
        self.is_local, self.concurrency, self.retries = cluster is None, settings.concurrency or 1, 0
        self.configs: dict[str, Config] = {point.name: point.config for point in points}
        self.commands = {point.name: ["train", str(point.file), *point.overrides] for point in points}
        self.launches: dict[str, Launch] = {}
        for point in points:
            try:
                if cluster is None:
                    check_run(point.config, read_model_shape(point.config.model.path), ranks=None, files=True)
                else:
                    self.launches[point.name] = Launch(point.file, point.overrides, cluster)
                    self.retries = self.launches[point.name].profile.retries
            except ConfigError as error:
                raise ConfigError(f"{file}: run {point.name}: {error}") from None

    def run(self, name: str) -> LaunchedRun:
        """The run of that name."""
        if not self.is_local:
            return self.launches[name].run
        folder = Path.cwd() / self.configs[name].run.directory.expanduser() / name
        return LaunchedRun(name, PurePosixPath(folder), Tunnel())

    def statuses(self) -> dict[str, RunStatus]:
        """The state of all runs, by name; NoAnswer if Slurm does not respond."""
        return self._statuses(self._queue())

    def _queue(self) -> Queue:
        queue = Queue(None if self.is_local else next(iter(self.launches.values())).profile.tunnel)
        queue.jobs()  # read before the folders: a job writes its outcome before it leaves the queue
        return queue

    def _statuses(self, queue: Queue) -> dict[str, RunStatus]:
        return {name: self._status(self.run(name), queue) for name in self.configs}

    def _status(self, run: LaunchedRun, queue: Queue) -> RunStatus:
        # By name, too: a sweep that was killed between submitting a job and recording it does not know the id.
        named = [number for number, job in queue.jobs().items() if job.name == run.name]
        run = replace(run, submitted=(*run.submitted, *named))
        status, jobs = look_at(run, queue), run.queued(queue)
        if jobs:  # whatever the outcome of an earlier launch
            state = "waiting" if all(job.after for job in jobs.values()) else state_of(jobs)
        elif self.is_local and not run.outcome():
            known = Path(run.launch_folder).is_dir()
            state = "running" if is_running(run) else "interrupted" if known else "not launched"
        elif status.state == "not submitted":
            state = "not launched"
        else:
            return status
        return replace(status, state=state, jobs=tuple(jobs), note="")

    def to_submit(self, statuses: Mapping[str, RunStatus], retry_failed: bool = False) -> list[str]:
        """Names of the runs that are neither finished nor active; failed ones only on request.

        Raises ConfigError if a run of that name has run with other values.
        """
        names = []
        for name, status in statuses.items():
            active = status.is_active and not self.is_local  # on this machine, wait for it and resume it
            failed = status.state.startswith("failed") and not retry_failed
            if not active and not failed and self._is_open(name, status.state == "finished"):
                names.append(name)
        return names

    def _is_open(self, name: str, finished: bool) -> bool:
        """Whether a run has something left to do; a finished one only if `trainer.steps` was raised."""
        run, config = self.run(name), self.configs[name]
        text = run.read(run.run_folder / "config.yaml")
        if not text:
            return not finished
        before = yaml.safe_load(text)
        other = [
            change
            for change in changes(before, config)
            if change.makes_another_run or finished and change.key.startswith("optimizer.")
            if change.key not in config.checkpoint.allow_changed
        ]
        if other:
            raise ConfigError.listing(
                f"{run.run_folder} has run with other values: use another name: in the sweep, or restore them",
                [str(change) for change in other],
            )
        return not finished or before["trainer"]["steps"] < config.trainer.steps

    def submit(self, retry_failed: bool, say: Callable[[str], None]) -> None:
        """Queue each run of `to_submit` behind the lane with the fewest runs; without a cluster, run them.

        `say` is called with a message for each run. Raises UserError if Slurm refuses one: those before it are queued,
        and the same command submits the others.
        """
        queue = self._queue()
        statuses = self._statuses(queue)
        names = self.to_submit(statuses, retry_failed)
        if self.is_local:
            run_here({name: (self.run(name), self.commands[name]) for name in names}, say)
            return
        active = [{job: queue.jobs()[job] for job in status.jobs} for status in statuses.values() if status.jobs]
        lanes = lanes_of(self.concurrency, active)
        for name in names:
            lane = min(lanes, key=len)
            after = lane[-1] if lane else []
            jobs = list(self.launches[name].submit(after).submitted)
            say(" ".join([f"{name}: job", *jobs, *(["after", *after] if after else [])]))
            lane.append(jobs)

    def cancel(self, say: Callable[[str], None]) -> None:
        """Cancel all active runs: waiting ones first, because they would start when those before them end.

        `say` is called with a message for each run. Raises UserError if Slurm does not respond, or refuses.
        """
        active = {name: status for name, status in self.statuses().items() if status.is_active}
        for name in sorted(active, key=lambda name: active[name].state == "running"):
            say(cancel(replace(self.run(name), submitted=active[name].jobs)))
        if not active:
            say("none of its runs is queued or running")

    def wait(self, say: Callable[[str], None]) -> None:
        """Wait until no run is active. `say` is called as by `poll`, and with every change of a state."""
        before: dict[str, str] = {}
        gone, pace = 0, QueryInterval(monitor.POLL_S)

        def look() -> bool | None:
            nonlocal before, gone
            statuses = self.statuses()
            now = {name: status.state for name, status in statuses.items()}
            for name in before:
                if before[name] != now[name]:
                    say(f"{name}: {before[name]} -> {now[name]}")
            before = now
            gone = 0 if any(status.is_active for status in statuses.values()) else gone + 1
            # Over a network file system an outcome may arrive later than its job leaves the queue.
            return bool(gone and "lost" not in now.values() or gone >= monitor.GONE_S / monitor.POLL_S) or None

        poll(look, say, lambda: monitor.POLL_S if gone else pace.pause_s())

    def cost(self) -> str:
        """The size of all runs in one line: steps, responses, and GPU hours."""
        trainers = [config.trainer for config in self.configs.values()]
        steps = sum(trainer.steps for trainer in trainers)
        responses = sum(trainer.steps * trainer.prompts_per_step * trainer.group_size for trainer in trainers)
        size = f"{len(trainers)} runs, {steps:,} steps, {responses:,} responses without dynamic sampling"
        if all(config.policy.device == "cpu" for config in self.configs.values()):
            return size
        if self.is_local:
            return (
                f"{size}; {sum(trainer.ranks for trainer in trainers):,} GPU hours for each hour that every run takes"
            )
        hours = sum(launch.profile.gpu_hours for launch in self.launches.values())
        return f"{size}; at most {hours:,.0f} GPU hours within the time limits of the jobs, without requeueing"

    def table(self, statuses: Mapping[str, RunStatus], chosen: Sequence[str] = ()) -> Table:
        """A table with a line per run, those marked that would be submitted, and the number of runs in each state."""
        counts = Counter(status.state for status in statuses.values())
        summary = ", ".join(f"{number} {state}" for state, number in counts.items())
        table = Table(box=None, pad_edge=False, caption=summary, caption_justify="left")
        for title in ("run", "job", "state", "step", "retries", "last error"):
            table.add_column(title, no_wrap=title in ("job", "step"))
        for name, status in statuses.items():
            state = f"{status.state}, to be submitted" if name in chosen else status.state
            steps = f"{status.progress.get('step', 0)}/{self.configs[name].trainer.steps}"
            retries = f"{status.spent}/{self.retries}"
            table.add_row(name, " ".join(status.jobs) or "-", state, steps, retries, status.note[:200] or "-")
        return table


Lane = list[list[str]]
"""Ids of the jobs of each run in a chain of runs in Slurm's queue, of which only the first runs."""


def lanes_of(concurrency: int, active: Sequence[Mapping[str, QueuedJob]]) -> list[Lane]:
    """The lanes of the jobs of each active run; if an earlier limit was higher, merged into `concurrency` lanes."""
    found: list[Lane] = []
    for jobs in sorted(active, key=lambda jobs: min(map(int, jobs))):  # each waits only for earlier ones
        after = {other for job in jobs.values() for other in job.after}
        earlier = [lane for lane in found if after & {*lane[-1]}]
        found = [lane for lane in found if lane not in earlier] + [[*sum(earlier, []), list(jobs)]]
    lanes: list[Lane] = [[] for _ in range(concurrency)]
    for number, lane in enumerate(found):
        merged = lanes[number % concurrency]
        last = [*(merged[-1] if merged else []), *lane[-1]]  # the next run waits for all of them
        lanes[number % concurrency] = [*merged, *lane[:-1], last]
    return lanes


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
