"""Launched runs: their state, the records of their attempts, how to cancel them.

The folder `launch` of a run contains the records of its jobs (`attempts.sh`): job ids, attempts, outcome. `registry`
finds runs by name, `monitor` shows and waits for them, `logs` prints their output.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from g2rl_launch.ssh import NoAnswer, Tunnel
from megatron_g2rl.config.run_files import STOPPED
from megatron_g2rl.errors import UserError

SILENT = "Slurm does not respond"
"""State of a run that is unknown because Slurm does not respond."""

_STATUS = {"step": (int,), "phase": (str,), "time": (int, float), "health": (str,)}
"""Entries of status.json that are used, and their types."""


class QueuedJob(NamedTuple):
    """A job in Slurm's queue: its state in lower case, its name, the jobs that it waits for, and why it is pending."""

    state: str
    name: str
    after: frozenset[str]
    reason: str


class Queue:
    """The user's jobs in Slurm's queue: read once, when they are first needed, for any number of runs."""

    def __init__(self, tunnel: Tunnel | None):
        """`tunnel` is the way to Slurm; None: there is no Slurm, and the queue is empty."""
        self._tunnel = tunnel
        self.problem = ""
        """Why Slurm did not respond, in one line; empty if it did, or was not asked yet."""

    @cached_property
    def _jobs(self) -> dict[str, QueuedJob]:
        if self._tunnel is None:
            return {}
        # Not a list of ids: squeue rejects it if Slurm no longer knows one of them.
        try:
            lines = self._tunnel.run(["squeue", "--noheader", "--me", "--format=%A|%T|%j|%E|%r"]).splitlines()
        except UserError as error:
            self.problem = " ".join(str(error).split())
            return {}
        cells = [line.split("|", 4) for line in lines if line.count("|") >= 4]
        return {
            number: QueuedJob(state.lower(), name, frozenset(re.findall(r"afterany:(\d+)", after)), reason)
            for number, state, name, after, reason in cells
        }

    def jobs(self) -> Mapping[str, QueuedJob]:
        """The jobs by id. Raises NoAnswer, with squeue's message, if Slurm does not respond."""
        jobs = self._jobs
        if self.problem:
            raise NoAnswer(self.problem)
        return jobs


class Attempt(NamedTuple):
    """A line of attempts.tsv: an ended attempt (job.restart), its exit code or `lost`, steps, and all retries spent."""

    time: str
    job: str
    code: str
    step_before: str
    step_after: str
    spent: str


@dataclass(frozen=True)
class LaunchedRun:
    """A run, its folder, and how to reach it. What reads its files raises NoAnswer if that machine is not reached."""

    name: str
    """Name of the run."""
    run_folder: PurePosixPath
    """Folder of the run on the machine where it runs."""
    tunnel: Tunnel
    """How to reach that machine."""
    submitted: tuple[str, ...] = ()
    """Ids of the jobs that the launch submitted; those of jobs submitted manually are in the folder."""
    earlier: str = ""
    """Id of the previous launch, whose records were in the folder when this one was submitted."""

    @property
    def launch_folder(self) -> PurePosixPath:
        """Where its attempts are counted and logged."""
        return self.run_folder / "launch"

    def read(self, file: PurePosixPath) -> str:
        """A file's text; empty if it does not exist."""
        return self.tunnel.try_run(["cat", str(file)])

    def record(self, name: str) -> str:
        """The text of a file in its launch folder, without surrounding space; empty if it does not exist."""
        return self.read(self.launch_folder / name).strip()

    def jobs(self) -> list[str]:
        """Ids of its jobs, the oldest first."""
        written = [line for line in self.record("jobs").split() if line.isdecimal()]
        return list(dict.fromkeys([*written, *self.submitted]))

    def queued(self, queue: Queue | None = None) -> dict[str, QueuedJob]:
        """Those of its jobs that have not ended, by id; NoAnswer if Slurm does not respond.

        From `queue` if it is given, to read it once for many runs.
        """
        jobs = self.jobs()
        if not jobs:
            return {}
        states = (queue or Queue(self.tunnel)).jobs()
        return {job: states[job] for job in jobs if job in states}

    def outcome(self) -> tuple[str, int] | None:
        """How it ended (finished, failed, stopped, cancelled) with its exit code; None if it has not ended."""
        written = re.fullmatch(r"(\w+)\s+(-?[0-9]{1,9})", self.record("outcome"))
        return None if not written or self._has_not_begun() else (written[1], int(written[2]))

    def launch_id(self) -> str:
        """Id of the latest launch that has started; empty if none has."""
        return self.record("launch_id")

    def reason(self) -> str:
        """Why its job made no further attempt, if that is not obvious; empty otherwise."""
        text = self.record("reason")
        return "" if text and self._has_not_begun() else text

    def _has_not_begun(self) -> bool:
        """Whether the records in its folder are still those of the previous launch."""
        return bool(self.earlier) and self.launch_id() == self.earlier

    def step(self) -> dict[str, Any]:
        """Progress of the trainer: the entries of its status.json that have the expected types."""
        try:
            written = json.loads(self.read(self.run_folder / "status.json"))
        except (ValueError, RecursionError):
            return {}
        if not isinstance(written, dict):
            return {}
        return {name: value for name, value in written.items() if type(value) in _STATUS.get(name, ())}

    def attempts(self) -> list[Attempt]:
        """Ended attempts, the oldest first."""
        lines = self.record("attempts.tsv").splitlines()
        return [Attempt(*words) for line in lines if len(words := line.split("\t")) == 6]

    def state(self, queue: Queue | None = None) -> str:
        """Finished, failed (1), running, pending, cancelled, stopped (75), lost, not submitted, or `SILENT`."""
        try:
            ended = self.outcome()
            if not ended:
                if jobs := self.queued(queue):
                    return state_of(jobs)
                ended = self.outcome()  # the job may have ended between the two queries
            if ended:
                return ended[0] + (f" ({ended[1]})" if ended[1] else "")
            if self.was_cancelled():
                return "cancelled"
            if self.segments_used_up():
                return f"stopped ({STOPPED})"
            return "lost" if self.jobs() else "not submitted"
        except NoAnswer:
            return SILENT

    def was_cancelled(self) -> bool:
        """Whether `g2rl cancel` or scancel ended it."""
        mark = self.tunnel.try_run(["ls", str(self.launch_folder / "cancelled")])
        return bool(mark) or self.slurm_state().startswith("CANCELLED")

    def slurm_state(self) -> str:
        """Slurm's state of the latest job (TIMEOUT, NODE_FAIL, ...); empty if Slurm no longer knows the job.

        From accounting, or from the controller, which keeps it for a few minutes after the job's end.
        """
        jobs = self.jobs()
        if not jobs:
            return ""
        if state := self.tunnel.try_run(["sacct", "-nXP", "-oState", f"-j{jobs[-1]}"]).split("\n")[0].strip():
            return state
        shown = self.tunnel.try_run(["scontrol", "show", "job", "--oneliner", jobs[-1]])
        found = re.search(r"JobState=(\S+)", shown)
        return found[1] if found else ""

    def is_known_to_be_over(self) -> bool:
        """Whether a run without queued jobs and outcome is over: cancelled, or saved and stopped by its last job."""
        attempts, jobs = self.attempts(), self.jobs()
        last = attempts[-1].job.split(".")[0] if attempts else ""
        return self.was_cancelled() or self.segments_used_up() and [last] == jobs[-1:]

    def segments_used_up(self) -> bool:
        """Whether its last attempt saved and stopped; if nothing is queued, relaunching resumes it."""
        attempts = self.attempts()
        return bool(attempts) and attempts[-1].code == str(STOPPED) and not self.unfinished_attempt()

    def unfinished_attempt(self) -> str:
        """The attempt (job.restart) that started but has not recorded how it ended; empty if there is none."""
        return self.record("running")

    def cancel(self) -> list[str]:
        """Cancel its jobs; the ids of those that had not ended.

        Raises NoAnswer if Slurm does not respond, and nothing was changed; UserError if it refuses.
        """
        try:
            jobs = list(self.queued())
        except NoAnswer as error:
            raise NoAnswer(f"{self.name} is not cancelled: {error}") from None
        if not jobs:
            return []
        self.tunnel.run(["mkdir", "-p", str(self.launch_folder)])
        self.tunnel.run(["touch", str(self.launch_folder / "cancelled")])
        try:
            self.tunnel.run(["scancel", *jobs])
        except UserError as error:
            raise UserError(
                f"{error}\n{self.name} is not cancelled: job {', '.join(jobs)} keeps running, though no other attempt "
                f"will begin. Call `g2rl cancel {self.name}` again"
            ) from None
        return jobs


def state_of(jobs: Mapping[str, QueuedJob]) -> str:
    """State of a run with these jobs in the queue."""
    states = [job.state for job in jobs.values()]
    return "running" if "running" in states else states[0]


def cancel(run: LaunchedRun) -> str:
    """Cancel a run; a message about what was done. Raises as `LaunchedRun.cancel` does."""
    if jobs := run.cancel():
        return f"{run.name}: cancelled {', '.join(jobs)}"
    if not run.jobs():  # a rendered script, submitted manually
        return f"{run.name}: none of its jobs has started; scancel --name={run.name} cancels one that is queued"
    return f"{run.name}: none of its jobs is queued or running"
