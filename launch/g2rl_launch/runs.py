"""Looks after launched runs: how they stand, what their attempts left, how to end them.

The folder `launch` of a run holds what its jobs wrote down (`attempts.sh`): job ids, attempts, outcome. `registry`
knows runs by their names, `waiting` waits for them, `logs` shows what they said.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Literal

from g2rl_launch.profiles import Tunnel, ssh_of
from g2rl_launch.ssh import SSHS_OWN
from megatron_g2rl.errors import UserError

STOPPED = 75
"""Exit code of a run that was asked to stop and can be resumed (as in `stopping`, which imports torch)."""
SILENT = "Slurm does not answer"
"""State of a run of which nothing is known for that reason."""


_STATUS = {"step": (int,), "phase": (str,), "time": (int, float), "pid": (int,)}
"""Entries of status.json and their types."""


class NoAnswer(UserError):
    """Slurm, or the machine that it is on, does not answer: nothing is known of jobs."""


@dataclass(frozen=True)
class LaunchedRun:
    """A run, its folder, and the way there."""

    name: str
    """Name of the run."""
    run_folder: PurePosixPath
    """Folder of the run, where it runs."""
    tunnel: Tunnel
    """How that machine is reached."""
    submitted: tuple[str, ...] = ()
    """Ids of the jobs that the launch submitted; those of jobs submitted by hand are in the folder."""
    executor: Literal["slurm", "local"] = "slurm"
    """As in the profile."""
    earlier: str = ""
    """Id of the launch whose outcome lay in the folder when this one was submitted: it is not this one's."""

    @property
    def launch_folder(self) -> PurePosixPath:
        """Where its attempts are counted and logged."""
        return self.run_folder / "launch"

    def read(self, file: PurePosixPath) -> str:
        """A file's text; empty when there is none."""
        return self.ask(["cat", str(file)])

    def ask(self, command: Sequence[str]) -> str:
        """Output of a command there; empty when it fails.

        Raises:
            NoAnswer: the machine cannot be reached.
        """
        try:
            return self.demand(command)
        except NoAnswer:
            raise
        except UserError:
            return ""

    def demand(self, command: Sequence[str]) -> str:
        """Output of a command there.

        Raises:
            NoAnswer: the machine cannot be reached; what ssh said.
            UserError: it failed; what it said.
        """
        try:
            done = subprocess.run(self._there(command), capture_output=True, text=True, errors="replace")
        except FileNotFoundError:
            raise UserError(f"{command[0]} is not on this machine") from None
        if done.returncode:
            raise self._failure(command, done.returncode, done.stderr)
        return done.stdout

    def stream(self, command: Sequence[str], into: BinaryIO) -> int:
        """Copy the output of a command there as it comes; the number of bytes.

        Raises:
            NoAnswer, UserError: as for `demand`; what came before has been copied.
        """
        copied = 0
        with (
            TemporaryFile() as said,
            subprocess.Popen(self._there(command), stdout=subprocess.PIPE, stderr=said) as sent,
        ):
            while chunk := sent.stdout.read1(1 << 16):
                into.write(chunk)
                copied += len(chunk)
            if sent.wait():
                said.seek(0)
                raise self._failure(command, sent.returncode, said.read().decode(errors="replace"))
        return copied

    def _failure(self, command: Sequence[str], code: int, said: str) -> UserError:
        if self.tunnel.kind == "ssh" and code == SSHS_OWN:
            return NoAnswer(ssh_of(self.tunnel).not_reached(said.strip()))
        return UserError(f"{command[0]} failed: {said.strip() or code}{hint_of(said)}")

    def _there(self, command: Sequence[str]) -> list[str]:
        if self.tunnel.kind == "local":
            return list(command)
        return [*ssh_of(self.tunnel).words(), shlex.join(command)]

    def jobs(self) -> list[str]:
        """Ids of its jobs, the oldest first; on one machine those of its processes."""
        written = [line for line in self.read(self.launch_folder / "jobs").split() if line.isdecimal()]
        return list(dict.fromkeys([*written, *self.submitted]))

    def queue(self) -> dict[str, str]:
        """State and reason of all of the user's jobs that Slurm has, by id.

        Raises:
            NoAnswer: Slurm does not answer; what squeue said.
        """
        # One id that Slurm has forgotten would make it refuse a list of ids.
        try:
            lines = self.demand(["squeue", "--noheader", "--me", "--format=%A %T %r"]).splitlines()
        except UserError as error:
            raise NoAnswer(str(error)) from None
        return dict(line.split(" ", 1) for line in lines if " " in line)

    def queued(self, queue: Callable[[LaunchedRun], Mapping[str, str]] | None = None) -> dict[str, str]:
        """State of those of its jobs that are not over, by id.

        Args:
            queue: instead of `LaunchedRun.queue`.

        Raises:
            NoAnswer: Slurm does not answer.
        """
        jobs = self.jobs()
        if not jobs:
            return {}
        if self.executor == "local":
            return {jobs[-1]: "RUNNING"} if self.is_held() else {}
        found = (queue or LaunchedRun.queue)(self)
        return {job: found[job] for job in jobs if job in found}

    def is_held(self) -> bool:
        """Whether the script of a run on this machine, or anything that it started, still runs."""
        try:
            with (Path(self.launch_folder) / "local.lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # there is no such file, or the file system has no locks
            return False
        return False

    def outcome(self) -> tuple[str, int] | None:
        """How it ended (finished, failed, stopped, cancelled) with its exit code; None while it goes on."""
        written = re.fullmatch(r"\s*(\w+)\s+(-?[0-9]{1,9})\s*", self.read(self.launch_folder / "outcome"))
        return None if not written or self._has_not_begun() else (written[1], int(written[2]))

    def launch_id(self) -> str:
        """What the attempts of the newest launch that has begun have in common; empty before the first."""
        return self.read(self.launch_folder / "launch_id").strip()

    def reason(self) -> str:
        """Why its job made no other attempt, where that needs saying; empty otherwise."""
        said = self.read(self.launch_folder / "reason").strip()
        return "" if said and self._has_not_begun() else said

    def _has_not_begun(self) -> bool:
        """Whether what lies in its folder still is an earlier launch's."""
        return bool(self.earlier) and self.launch_id() == self.earlier

    def step(self) -> dict[str, Any]:
        """Where the trainer is: those entries of its status.json that are what a run writes."""
        try:
            written = json.loads(self.read(self.run_folder / "status.json"))
        except (ValueError, RecursionError):
            return {}
        if not isinstance(written, dict):
            return {}
        return {name: value for name, value in written.items() if type(value) in _STATUS.get(name, ())}

    def attempts(self) -> list[list[str]]:
        """Ended attempts: time, job.restart, exit code, step before, step after, retries spent."""
        lines = self.read(self.launch_folder / "attempts.tsv").splitlines()
        return [words for line in lines if len(words := line.split("\t")) == 6]

    def cancel(self) -> list[str]:
        """End its jobs for good; those that were not over.

        Raises:
            NoAnswer: Slurm does not answer; nothing was done.
            UserError: its jobs could not be ended.
        """
        try:
            jobs = list(self.queued())
        except NoAnswer as error:
            raise NoAnswer(f"{self.name} is not cancelled: {error}") from None
        if not jobs:
            return []
        self.demand(["mkdir", "-p", str(self.launch_folder)])
        self.demand(["touch", str(self.launch_folder / "cancelled")])
        if self.executor == "local":
            self.stop_here()
            return jobs
        try:
            self.demand(["scancel", *jobs])
        except UserError as error:
            raise UserError(
                f"{error}\n{self.name} is not cancelled: what runs of it (job {', '.join(jobs)}) goes on, though no "
                f"other attempt will begin. Call `g2rl cancel {self.name}` again"
            ) from None
        return jobs

    def stop_here(self) -> None:
        """Tell the processes of a run on this machine to save and stop, if it is under way."""
        for process in self.queued():
            os.killpg(os.getpgid(int(process)), signal.SIGTERM)

    def state(self, queue: Callable[[LaunchedRun], Mapping[str, str]] | None = None) -> str:
        """Finished, failed (1), running, pending, cancelled, stopped (75), lost, not submitted, or `SILENT`.

        Args:
            queue: as for `queued`.
        """
        try:
            ended = self.outcome()
            if not ended:
                states = [state.split()[0].lower() for state in self.queued(queue).values()]
                if states:
                    return "running" if "running" in states else states[0]
                ended = self.outcome()  # of a job that ended between the two questions
            if ended:
                return ended[0] if ended[1] == 0 else f"{ended[0]} ({ended[1]})"
            return self._state_without_jobs()
        except NoAnswer:
            return SILENT

    def _state_without_jobs(self) -> str:
        if self.was_cancelled():
            return "cancelled"
        if self.segments_used_up():
            return f"stopped ({STOPPED})"
        return "lost" if self.jobs() else "not submitted"

    def was_cancelled(self) -> bool:
        """Whether `g2rl cancel` ended it, or somebody's scancel."""
        if self.ask(["ls", str(self.launch_folder / "cancelled")]):
            return True
        jobs = self.jobs() if self.executor == "slurm" else []
        return bool(jobs) and self._last_state(jobs[-1]).startswith("CANCELLED")

    def _last_state(self, job: str) -> str:
        """Slurm's word for how a job ended: accounting's, or for a few minutes the controller's; empty without both."""
        found = self.ask(["sacct", "-nXP", "-oState", f"-j{job}"]).split("\n")[0].strip()
        if found:
            return found
        shown = re.search(r"JobState=(\S+)", self.ask(["scontrol", "show", "job", "--oneliner", job]))
        return shown[1] if shown else ""

    def is_known_to_be_over(self) -> bool:
        """Whether, with nothing queued and without an outcome, it was cancelled or its last job saved and stopped."""
        attempts, jobs = self.attempts(), self.jobs()
        last = attempts[-1][1].split(".")[0] if attempts else ""
        return self.was_cancelled() or self.segments_used_up() and [last] == jobs[-1:]

    def segments_used_up(self) -> bool:
        """Whether its last attempt saved and stopped; with nothing queued, launching it again goes on from there."""
        attempts = self.attempts()
        return bool(attempts) and attempts[-1][2] == str(STOPPED) and not self.cut_off()

    def cut_off(self) -> str:
        """The attempt (job.restart) that has begun and not written down how it ended; empty when there is none."""
        return self.read(self.launch_folder / "running").strip()

    def slurms_word(self) -> str:
        """How Slurm says that the newest job ended (TIMEOUT, NODE_FAIL, ...); empty where it does not say."""
        jobs = self.jobs() if self.executor == "slurm" else []
        return self._last_state(jobs[-1]) if jobs else ""


def hint_of(said: str) -> str:
    """What to do about Slurm's least clear message, to be put after it; else empty."""
    if "configuration source" not in said:
        return ""
    return (
        "\nSlurm's commands find no cluster: SLURM_CONF is not set here, or names no file. "
        'eval "$(launch/local_slurm/up.sh)" sets it for the local Slurm'
    )


def end(run: LaunchedRun) -> str:
    """Cancel a run; what to tell of it.

    Raises:
        UserError: as `LaunchedRun.cancel`.
    """
    jobs = run.cancel()
    if jobs:
        return f"{run.name}: cancelled {', '.join(jobs)}"
    if run.executor == "slurm" and not run.jobs():  # sbatch of a rendered script, by hand
        return f"{run.name}: no job of it has begun; scancel --name={run.name} ends one that waits in the queue"
    return f"{run.name}: nothing of it is queued or runs"
