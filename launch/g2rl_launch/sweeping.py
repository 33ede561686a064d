"""Runs of a sweep: which are submitted, behind which others they wait, how they all stand.

On Slurm all runs are submitted at once, and Slurm keeps the limit with nobody watching: the runs form as many lanes as
may be under way at once, and in a lane each waits for the one before (`--dependency=afterany`), requeued or not. Lanes
are read back from the queue, so nothing is lost with the command that made them: the same command again submits what is
neither finished nor under way, behind what there is. On one machine (`executor: local`) the command itself starts the
runs; killed, it leaves those it started to their end, and the same command again waits for them.
"""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import yaml
from rich.table import Table

from g2rl_launch.command import Launch
from g2rl_launch.here import start_here, stop_all, stopping_on_request
from g2rl_launch.lanes import FORMAT, Lanes, QueuedJob, queued_jobs
from g2rl_launch.runs import end
from g2rl_launch.status import why
from g2rl_launch.sweep import load_sweep
from g2rl_launch.waiting import GONE_S, Pace, Patience
from megatron_g2rl.config.changes import changes
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.errors import UserError

POLL_S = 5.0


@dataclass(frozen=True)
class Standing:
    """How a run of the sweep stands."""

    state: str
    """finished, failed (1), running, pending, waiting (in the queue, behind others), not launched, ..."""
    jobs: tuple[str, ...] = ()
    """Ids of its jobs that Slurm has."""
    step: int = 0
    """Steps done."""
    spent: str = "0"
    """Retries spent."""
    error: str = ""
    """Why it failed, in a line."""

    @property
    def is_under_way(self) -> bool:
        """Whether it needs nothing to be done."""
        return bool(self.jobs) or self.state == "running"


class SweepRuns:
    """The runs of a sweep, every one of them checked as `g2rl launch` checks it."""

    def __init__(self, file: Path, cluster: str | None = None):
        """Read the sweep and what it names.

        Raises:
            ConfigError: something cannot be used; the message names the run where it is one run's own.
        """
        sweep, points = load_sweep(file)
        cluster = cluster or sweep.cluster
        if cluster is None:
            raise ConfigError(f"{file} names no cluster: add cluster: PROFILE, or --cluster PROFILE")
        self.concurrency = sweep.concurrency
        self.launches: dict[str, Launch] = {}
        for point in points:
            try:
                self.launches[point.name] = Launch(sweep.config, point.overrides, cluster)
            except ConfigError as error:
                raise ConfigError(f"{file}: run {point.name}: {error}") from None
        self.profile = next(iter(self.launches.values())).profile
        self.is_local = self.profile.executor == "local"

    def standings(self) -> dict[str, Standing]:
        """How all runs stand, by name.

        Raises:
            UserError: Slurm does not answer.
        """
        return self._look()[0]

    def _look(self) -> tuple[dict[str, Standing], dict[str, QueuedJob]]:
        # The queue before the folders: a job writes its outcome before it leaves the queue.
        any_run = next(iter(self.launches.values())).run
        said = "" if self.is_local else any_run.demand(["squeue", "--noheader", "--me", f"--format={FORMAT}"])
        queue = queued_jobs(said)
        return {name: self._standing(launch, queue) for name, launch in self.launches.items()}, queue

    def _standing(self, launch: Launch, queue: Mapping[str, QueuedJob]) -> Standing:
        run = launch.run
        # A sweep that was killed between Slurm's answer and its own note knows them by name alone.
        own = set(run.jobs()) if queue else set()
        jobs = tuple(job.number for job in queue.values() if job.number in own or job.name == run.name)
        if not jobs and not run.ask(["ls", "-d", str(run.launch_folder)]):
            return Standing("not launched")
        attempts, step = run.attempts(), run.step().get("step", 0)
        spent = attempts[-1][-1] if attempts else "0"
        if jobs:
            states = {queue[job].state.lower() for job in jobs}
            waits = all(queue[job].after for job in jobs)
            return Standing(
                "running" if "running" in states else "waiting" if waits else min(states), jobs, step, spent
            )
        state = run.state(lambda _: {})  # nothing of it is in the queue
        return Standing(state, (), step, spent, "" if state in ("finished", "running") else why(run))

    def to_submit(self, standings: Mapping[str, Standing], retry_failed: bool = False) -> list[str]:
        """Names of the runs that are neither finished nor under way; failed ones only on request.

        Raises:
            ConfigError: a run of that name has run with other values.
        """
        found = []
        for name, standing in standings.items():
            if standing.is_under_way or standing.state.startswith("failed") and not retry_failed:
                continue
            if self._is_open(self.launches[name], standing.state == "finished"):
                found.append(name)
        return found

    def _is_open(self, launch: Launch, finished: bool) -> bool:
        """Whether a run has something left to do; a finished one, when it is to have more steps than it had."""
        text = launch.run.read(launch.run.run_folder / "config.yaml")
        if not text:
            return not finished
        before, config = yaml.safe_load(text), launch.config
        allowed = config.checkpoint.allow_changed.split(",")
        other = [
            change
            for change in changes(before, config)
            if change.makes_another_run or finished and change.key.startswith("optimizer.")
            if change.key not in allowed
        ]
        if other:
            raise ConfigError.listing(
                f"{launch.run.run_folder} has run with other values: take another name: in the sweep, or set them back",
                [str(change) for change in other],
            )
        return not finished or before["trainer"]["steps"] < config.trainer.steps

    def submit(self, retry_failed: bool, say: Callable[[str], None]) -> None:
        """Queue what is to be submitted, each run behind the lane with the fewest runs.

        Args:
            retry_failed: failed runs too.
            say: told a line for each.

        Raises:
            UserError: Slurm refused one; those before it are queued, and the same command submits the others.
        """
        standings, queue = self._look()
        under_way = [standing.jobs for standing in standings.values() if standing.jobs]
        lanes = Lanes(self.concurrency, under_way, queue)
        for name in self.to_submit(standings, retry_failed):
            after = lanes.next()
            _, answer = self.launches[name].submit(after)
            say(" ".join([f"{name}: job", *answer["jobs"], *["after", *after][: 2 * len(after)]]))
            lanes.add(answer["jobs"])

    def cancel(self, say: Callable[[str], None]) -> None:
        """End all runs that are under way: first those that wait, which would begin when one before them ends.

        Args:
            say: told a line for each.

        Raises:
            UserError: Slurm does not answer, or did not end one.
        """
        under_way = {name: state for name, state in self.standings().items() if state.is_under_way}
        for name in sorted(under_way, key=lambda name: under_way[name].state == "running"):
            say(end(replace(self.launches[name].run, submitted=under_way[name].jobs)))
        if not under_way:
            say("nothing of it is queued or runs")

    def wait(self, say: Callable[[str], None]) -> None:
        """Wait until no run is under way.

        Args:
            say: told every change of a state.
        """
        before: dict[str, str] = {}
        gone, pace, patience = 0, Pace(POLL_S), Patience(say)
        longest = GONE_S / POLL_S
        while True:
            try:
                standings = self.standings()
                patience.answer()
            except UserError as error:  # the controller is being restarted, or the network is away
                patience.no_answer(error)
                time.sleep(pace.pause_s())
                continue
            now = {name: standing.state for name, standing in standings.items()}
            for name in before:
                if before[name] != now[name]:
                    say(f"{name}: {before[name]} -> {now[name]}")
            before = now
            gone = 0 if any(standing.is_under_way for standing in standings.values()) else gone + 1
            # Over a network file system an outcome may arrive later than its job leaves the queue.
            if gone and "lost" not in now.values() or gone >= longest:
                return
            time.sleep(POLL_S if gone else pace.pause_s())

    def run_here(self, retry_failed: bool, say: Callable[[str], None]) -> None:
        """Run what is to be run on this machine, as many at once as the limit says; returns when all are over.

        SIGTERM and Ctrl-C stop the runs too: they save, and the same command goes on.

        Args:
            retry_failed: failed runs too.
            say: told a line for each.
        """
        waiting = self.to_submit(self.standings(), retry_failed)
        started: dict[str, subprocess.Popen] = {}
        with stopping_on_request(partial(stop_all, started, say)):
            while True:
                busy = [name for name, launch in self.launches.items() if launch.run.is_held()]
                for name in [name for name in waiting if name not in busy][: max(0, self.concurrency - len(busy))]:
                    say(f"{name}: started")
                    started[name] = start_here(self.launches[name])
                    waiting.remove(name)
                    busy.append(name)
                if not busy:
                    break
                time.sleep(min(1.0, POLL_S))
                for process in started.values():
                    process.poll()


def sweep_table(sweep: SweepRuns, standings: Mapping[str, Standing], chosen: Sequence[str] = ()) -> Table:
    """All runs, a line each, and how many are in which state.

    Args:
        sweep: the runs.
        standings: how they stand.
        chosen: those that would be submitted.
    """
    counted = Counter(standing.state for standing in standings.values())
    summary = ", ".join(f"{number} {state}" for state, number in counted.items())
    table = Table(box=None, pad_edge=False, caption=summary, caption_justify="left")
    for title in ("run", "job", "state", "step", "retries", "last error"):
        table.add_column(title, no_wrap=title in ("job", "step"))
    for name, standing in standings.items():
        launch = sweep.launches[name]
        state = f"{standing.state}, to be submitted" if name in chosen else standing.state
        steps, retries = f"{standing.step}/{launch.config.trainer.steps}", f"{standing.spent}/{sweep.profile.retries}"
        table.add_row(name, " ".join(standing.jobs) or "-", state, steps, retries, standing.error[:200] or "-")
    return table
