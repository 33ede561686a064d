"""Launched runs: their state, the records of their attempts, how to cancel them, and how to find them by name.

The folder `launch` of a run contains the records of its jobs (`attempts.sh`): job ids, attempts, outcome. A small file
per run in the user's state folder records where the run is. `monitor` shows runs and waits for them.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from g2rl_launch.ssh import NoAnswer, Tunnel
from megatron_g2rl.config.run_files import STOPPED
from megatron_g2rl.config.sections.base import Section
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
    """A run, its folder where it runs, and how to reach that machine; reading its files may raise NoAnswer.

    `submitted` are the ids of the jobs that the launch submitted; those of jobs submitted manually are in the folder.
    `earlier` is the id of the previous launch, whose records were in the folder when this one was submitted.
    """

    name: str
    run_folder: PurePosixPath
    tunnel: Tunnel
    submitted: tuple[str, ...] = ()
    earlier: str = ""

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


class _Entry(Section):
    """Content of a launched run's file: the fields of LaunchedRun but its name."""

    run_folder: PurePosixPath
    tunnel: Tunnel
    jobs: tuple[Annotated[str, Field(pattern=r"^[0-9A-Za-z_.]+$")], ...] = ()
    earlier: str = ""


@contextmanager
def launching(name: str) -> Iterator[None]:
    """Hold the lock that lets only one process at a time launch a run of that name; UserError if another one does."""
    file = _file(name).with_suffix(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{name} is being launched by another process; g2rl status {name}") from None
        except OSError:
            pass  # a file system without locks: attempts.sh refuses a second job
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def remember(run: LaunchedRun) -> None:
    """Record a launched run under its name, instead of an earlier one."""
    file = _file(run.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    entry = _Entry(run_folder=run.run_folder, tunnel=run.tunnel, jobs=run.submitted, earlier=run.earlier)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(entry.model_dump_json() + "\n")
    partial.replace(file)


def remembered(name: str) -> LaunchedRun | None:
    """The run that was last launched from this machine under that name; None if there is none.

    Raises UserError if its file is invalid.
    """
    file = _file(name)
    if not file.is_file():
        return None
    try:
        entry = _Entry.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        problem = str(error).splitlines()[0]
        remedy = "remove it, and name the run by its folder"
        raise UserError(f"{file} is not a record of a launched run ({problem}); {remedy}") from None
    return LaunchedRun(name, entry.run_folder, entry.tunnel, entry.jobs, entry.earlier)


def known(run: LaunchedRun) -> LaunchedRun | None:
    """The run as it was last launched from this machine; None if it was not, or another one of that name was."""
    before = remembered(run.name)
    return before if before and (before.run_folder, before.tunnel) == (run.run_folder, run.tunnel) else None


def find(name: str) -> LaunchedRun:
    """The launched run of that name, or the run in that folder; UserError, with the nearest names, if there is none."""
    if "/" not in name and (run := remembered(name)):
        return run
    folder = Path(name).resolve()
    if (folder / "launch").is_dir():
        return LaunchedRun(folder.name, PurePosixPath(folder), Tunnel())
    nearest = get_close_matches(name, names(), n=3) or names()[:3]
    raise UserError(
        f"no run {name} was launched from here; the nearest names are: {', '.join(nearest) or 'none'}. "
        "`g2rl launch CONFIG --cluster PROFILE` launches one; for a run that was launched from another machine, give "
        "its folder, the one that contains `launch`: g2rl status FOLDER"
    )


def names() -> list[str]:
    """Names of the launched runs, the latest first."""
    files = sorted(_folder().glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.stem for file in files]


def _file(name: str) -> Path:
    return _folder() / f"{name}.json"


def _folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "g2rl" / "launched"
