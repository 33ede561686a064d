"""Run the sweeps of `sweep_file`: submit runs with their dependencies, and show the state of all of them.

On Slurm all runs are submitted immediately, and Slurm enforces the limit, unattended: the runs form `concurrency`
lanes, and in a lane each run waits for the one before it (`--dependency=afterany`), requeued or not. Lanes are
reconstructed from the queue, so no state is lost if the command is killed: the same command submits the runs that are
neither finished nor queued nor running, behind those that are. Without a cluster, `here` runs them on this machine.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import yaml
from rich.table import Table

from g2rl_launch.here import is_running, run_here
from g2rl_launch.monitor import GONE_S, QueryInterval, ResponseLog, why
from g2rl_launch.profile import Tunnel
from g2rl_launch.run import LaunchedRun, cancel
from g2rl_launch.submit import Launch, check_run
from g2rl_launch.sweep_file import load_sweep
from megatron_g2rl.config import Config
from megatron_g2rl.config.changes import changes
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.model_shape import read_model_shape
from megatron_g2rl.errors import UserError

POLL_S = 5.0
QUEUE_FORMAT = "%A|%j|%T|%E"
"""Output format of squeue that `queued_jobs` parses."""


@dataclass(frozen=True)
class RunStatus:
    """The state of a run of the sweep."""

    state: str
    """finished, failed (1), running, pending, waiting (queued behind others), not launched, ..."""
    jobs: tuple[str, ...] = ()
    """Ids of its jobs that are queued or running."""
    step: int = 0
    """Completed steps."""
    spent: str = "0"
    """Retries used up."""
    error: str = ""
    """Why it failed, in one line."""

    @property
    def is_active(self) -> bool:
        """Whether it is queued or running."""
        return bool(self.jobs) or self.state == "running"


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue."""

    number: str
    """Its id."""
    name: str
    """Its name, which is the run's."""
    state: str
    """Slurm's state."""
    after: frozenset[str]
    """Jobs that it still waits for."""


class Sweep:
    """The runs of a sweep, each checked like a run of `g2rl launch`."""

    def __init__(self, file: Path, cluster: str | None = None):
        """Read the sweep, its configuration and its profile.

        Args:
            file: YAML file of the sweep.
            cluster: profile that overrides the file's.

        Raises:
            ConfigError: something is invalid; the message names the run if only that run is affected.
        """
        settings, points = load_sweep(file)
        cluster = cluster or settings.cluster
        if cluster and settings.concurrency is None:
            raise ConfigError(f"{file}: concurrency is missing; set it to the maximum number of concurrent runs")
        self.is_local, self.concurrency, self.retries = cluster is None, settings.concurrency or 1, 0
        self.commands: dict[str, list[str]] = {}
        self.configs: dict[str, Config] = {}
        self.launches: dict[str, Launch] = {}
        for point in points:
            self.configs[point.name] = point.config
            self.commands[point.name] = ["train", str(settings.config), *point.overrides]
            try:
                if cluster is None:
                    check_run(point.config, read_model_shape(point.config.model.path), ranks=None, files=True)
                else:
                    self.launches[point.name] = Launch(settings.config, point.overrides, cluster)
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
        """The state of all runs, by name.

        Raises:
            UserError: Slurm does not respond.
        """
        return self._query()[0]

    def _query(self) -> tuple[dict[str, RunStatus], dict[str, QueuedJob]]:
        # Read the queue before the folders: a job writes its outcome before it leaves the queue.
        any_run = self.run(next(iter(self.configs)))
        text = "" if self.is_local else any_run.run(["squeue", "--noheader", "--me", f"--format={QUEUE_FORMAT}"])
        queue = queued_jobs(text)
        return {name: self._status(self.run(name), queue) for name in self.configs}, queue

    def _status(self, run: LaunchedRun, queue: Mapping[str, QueuedJob]) -> RunStatus:
        # By name, too: a sweep that was killed between submitting a job and recording it does not know the id.
        recorded = set(run.jobs()) if queue else set()
        jobs = tuple(job.number for job in queue.values() if job.number in recorded or job.name == run.name)
        if not jobs and not run.try_run(["ls", "-d", str(run.launch_folder)]):
            return RunStatus("not launched")
        attempts, step = run.attempts(), run.step().get("step", 0)
        spent = attempts[-1][-1] if attempts else "0"
        if jobs:
            states = {queue[job].state.lower() for job in jobs}
            waits = all(queue[job].after for job in jobs)
            state = "running" if "running" in states else "waiting" if waits else min(states)
            return RunStatus(state, jobs, step, spent)
        state = run.state(lambda _: {})  # none of its jobs is in the queue
        if self.is_local and not run.outcome():
            state = "running" if is_running(run) else "interrupted"
        return RunStatus(state, (), step, spent, why(run) if state.startswith(("failed", "lost", "stopped")) else "")

    def to_submit(self, statuses: Mapping[str, RunStatus], retry_failed: bool = False) -> list[str]:
        """Names of the runs that are neither finished nor active; failed ones only on request.

        Raises:
            ConfigError: a run of that name has run with other values.
        """
        names = []
        for name, status in statuses.items():
            active = status.is_active and not self.is_local  # on this machine, wait for it and resume it
            if active or status.state.startswith("failed") and not retry_failed:
                continue
            if self._is_open(name, status.state == "finished"):
                names.append(name)
        return names

    def _is_open(self, name: str, finished: bool) -> bool:
        """Whether a run has something left to do; a finished one only if `trainer.steps` was raised."""
        run, config = self.run(name), self.configs[name]
        text = run.read(run.run_folder / "config.yaml")
        if not text:
            return not finished
        before = yaml.safe_load(text)
        allowed = config.checkpoint.allow_changed
        other = [
            change
            for change in changes(before, config)
            if change.makes_another_run or finished and change.key.startswith("optimizer.")
            if change.key not in allowed
        ]
        if other:
            raise ConfigError.listing(
                f"{run.run_folder} has run with other values: use another name: in the sweep, or restore them",
                [str(change) for change in other],
            )
        return not finished or before["trainer"]["steps"] < config.trainer.steps

    def submit(self, retry_failed: bool, say: Callable[[str], None]) -> None:
        """Queue each run to be submitted behind the lane with the fewest runs; without a cluster, run them.

        Args:
            retry_failed: submit failed runs, too.
            say: called with a message for each run.

        Raises:
            UserError: Slurm refused one; those before it are queued, and the same command submits the others.
        """
        statuses, queue = self._query()
        names = self.to_submit(statuses, retry_failed)
        if self.is_local:
            run_here({name: (self.run(name), self.commands[name]) for name in names}, say)
            return
        lanes = Lanes(self.concurrency, [status.jobs for status in statuses.values() if status.jobs], queue)
        for name in names:
            after = lanes.next()
            jobs = self.launches[name].submit(after).submitted
            say(" ".join([f"{name}: job", *jobs, *["after", *after][: 2 * len(after)]]))
            lanes.add(jobs)

    def cancel(self, say: Callable[[str], None]) -> None:
        """Cancel all active runs: waiting ones first, because they would start when those before them end.

        Args:
            say: called with a message for each run.

        Raises:
            UserError: Slurm does not respond, or did not cancel one.
        """
        active = {name: status for name, status in self.statuses().items() if status.is_active}
        for name in sorted(active, key=lambda name: active[name].state == "running"):
            say(cancel(replace(self.run(name), submitted=active[name].jobs)))
        if not active:
            say("none of its runs is queued or running")

    def wait(self, say: Callable[[str], None]) -> None:
        """Wait until no run is active.

        Args:
            say: called with a message for every change of a state.
        """
        before: dict[str, str] = {}
        gone, pace, responses = 0, QueryInterval(POLL_S), ResponseLog(say)
        while True:
            try:
                statuses = self.statuses()
                responses.answer()
            except UserError as error:  # the controller is restarting, or the network is down
                responses.no_answer(error)
                time.sleep(pace.pause_s())
                continue
            now = {name: status.state for name, status in statuses.items()}
            for name in before:
                if before[name] != now[name]:
                    say(f"{name}: {before[name]} -> {now[name]}")
            before = now
            gone = 0 if any(status.is_active for status in statuses.values()) else gone + 1
            # Over a network file system an outcome may arrive later than its job leaves the queue.
            if gone and "lost" not in now.values() or gone >= GONE_S / POLL_S:
                return
            time.sleep(POLL_S if gone else pace.pause_s())

    def table(self, statuses: Mapping[str, RunStatus], chosen: Sequence[str] = ()) -> Table:
        """A table with a line per run, and the number of runs in each state.

        Args:
            statuses: states of the runs.
            chosen: names of the runs that would be submitted.
        """
        counts = Counter(status.state for status in statuses.values())
        summary = ", ".join(f"{number} {state}" for state, number in counts.items())
        table = Table(box=None, pad_edge=False, caption=summary, caption_justify="left")
        for title in ("run", "job", "state", "step", "retries", "last error"):
            table.add_column(title, no_wrap=title in ("job", "step"))
        for name, status in statuses.items():
            state = f"{status.state}, to be submitted" if name in chosen else status.state
            steps = f"{status.step}/{self.configs[name].trainer.steps}"
            retries = f"{status.spent}/{self.retries}"
            table.add_row(name, " ".join(status.jobs) or "-", state, steps, retries, status.error[:200] or "-")
        return table


class Lanes:
    """Chains of jobs in Slurm's queue, each waiting for the one before it: only the first of a lane runs."""

    def __init__(self, concurrency: int, active: Sequence[tuple[str, ...]], queue: Mapping[str, QueuedJob]):
        """Find the lanes in the queue; if an earlier limit was higher, merge them into `concurrency` lanes.

        Args:
            concurrency: number of lanes.
            active: ids of the jobs of each run in the queue.
            queue: these jobs by id.
        """
        depends = {jobs: {other for job in jobs for other in queue[job].after} for jobs in active}
        last = [jobs for jobs in active if not any(depends[other] & {*jobs} for other in active if other != jobs)]
        self._lanes: list[tuple[int, list[str]]] = [(0, []) for _ in range(concurrency)]
        for number, jobs in enumerate(last):
            length, tail = self._lanes[number % concurrency]
            self._lanes[number % concurrency] = (length + _length(jobs, active, depends), [*tail, *jobs])

    def next(self) -> list[str]:
        """Jobs that the next run has to wait for."""
        return self._shortest()[1]

    def add(self, jobs: Iterable[str]) -> None:
        """Append the next run's jobs to the lane that `next` returned."""
        shortest = self._shortest()
        self._lanes[self._lanes.index(shortest)] = (shortest[0] + 1, list(jobs))

    def _shortest(self) -> tuple[int, list[str]]:
        return min(self._lanes, key=lambda lane: lane[0])


def _length(jobs: tuple[str, ...], active: Sequence[tuple[str, ...]], depends: Mapping) -> int:
    return 1 + sum(_length(other, active, depends) for other in active if depends[jobs] & {*other})


def queued_jobs(text: str) -> dict[str, QueuedJob]:
    """The jobs in squeue's output, by id; it no longer lists satisfied dependencies."""
    cells = [line.split("|", 3) for line in text.splitlines() if line.count("|") >= 3]
    return {cell[0]: QueuedJob(*cell[:3], frozenset(re.findall(r"afterany:(\d+)", cell[3]))) for cell in cells}
