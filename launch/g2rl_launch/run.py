"""Launched runs: their state, the records of their attempts, how to cancel them.

The folder `launch` of a run contains the records of its jobs (`attempts.sh`): job ids, attempts, outcome. `registry`
finds runs by name, `monitor` shows and waits for them, `logs` prints their output.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from g2rl_launch.profile import Tunnel
from g2rl_launch.ssh import SSHS_OWN
from megatron_g2rl.config.run_files import STOPPED
from megatron_g2rl.errors import UserError

SILENT = "Slurm does not respond"
"""State of a run that is unknown because Slurm does not respond."""

_STATUS = {"step": (int,), "phase": (str,), "time": (int, float), "pid": (int,), "health": (str,)}
"""Entries of status.json and their types."""


class NoAnswer(UserError):
    """Slurm, or the machine that it runs on, does not respond: the state of jobs is unknown."""


@dataclass(frozen=True)
class LaunchedRun:
    """A run, its folder, and how to reach it."""

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
        return self.try_run(["cat", str(file)])

    def try_run(self, command: Sequence[str]) -> str:
        """Output of a command on the run's machine; empty if it fails.

        Raises:
            NoAnswer: the machine cannot be reached.
        """
        try:
            return self.run(command)
        except NoAnswer:
            raise
        except UserError:
            return ""

    def run(self, command: Sequence[str]) -> str:
        """Output of a command on the run's machine.

        Raises:
            NoAnswer: the machine cannot be reached; with ssh's message.
            UserError: the command failed; with its message.
        """
        try:
            done = subprocess.run(self._command(command), capture_output=True, text=True, errors="replace")
        except FileNotFoundError:
            raise UserError(f"{command[0]} is not installed on this machine") from None
        if done.returncode:
            raise self._failure(command, done.returncode, done.stderr)
        return done.stdout

    def stream(self, command: Sequence[str], into: BinaryIO) -> int:
        """Copy the output of a command on the run's machine as it arrives; the number of bytes.

        Raises:
            NoAnswer, UserError: as for `run`; output that arrived before has been copied.
        """
        copied = 0
        with (
            TemporaryFile() as errors,
            subprocess.Popen(self._command(command), stdout=subprocess.PIPE, stderr=errors) as process,
        ):
            while chunk := process.stdout.read1(1 << 16):
                into.write(chunk)
                copied += len(chunk)
            if process.wait():
                errors.seek(0)
                raise self._failure(command, process.returncode, errors.read().decode(errors="replace"))
        return copied

    def _failure(self, command: Sequence[str], code: int, message: str) -> UserError:
        if self.tunnel.kind == "ssh" and code == SSHS_OWN:
            return NoAnswer(self.tunnel.ssh.not_reached(message.strip()))
        return UserError(f"{command[0]} failed: {message.strip() or code}{slurm_hint(message)}")

    def _command(self, command: Sequence[str]) -> list[str]:
        if self.tunnel.kind == "local":
            return list(command)
        return [*self.tunnel.ssh.words(), shlex.join(command)]

    def jobs(self) -> list[str]:
        """Ids of its jobs, the oldest first."""
        written = [line for line in self.read(self.launch_folder / "jobs").split() if line.isdecimal()]
        return list(dict.fromkeys([*written, *self.submitted]))

    def queue(self) -> dict[str, str]:
        """State and reason of all of the user's jobs in Slurm's queue, by id.

        Raises:
            NoAnswer: Slurm does not respond; with squeue's message.
        """
        # Not a list of ids: squeue rejects it if Slurm no longer knows one of them.
        try:
            lines = self.run(["squeue", "--noheader", "--me", "--format=%A %T %r"]).splitlines()
        except UserError as error:
            raise NoAnswer(str(error)) from None
        return dict(line.split(" ", 1) for line in lines if " " in line)

    def queued(self, queue: Callable[[LaunchedRun], Mapping[str, str]] | None = None) -> dict[str, str]:
        """State of those of its jobs that have not ended, by id.

        Args:
            queue: used instead of `LaunchedRun.queue`.

        Raises:
            NoAnswer: Slurm does not respond.
        """
        jobs = self.jobs()
        if not jobs:
            return {}
        states = (queue or LaunchedRun.queue)(self)
        return {job: states[job] for job in jobs if job in states}

    def outcome(self) -> tuple[str, int] | None:
        """How it ended (finished, failed, stopped, cancelled) with its exit code; None if it has not ended."""
        written = re.fullmatch(r"\s*(\w+)\s+(-?[0-9]{1,9})\s*", self.read(self.launch_folder / "outcome"))
        return None if not written or self._has_not_begun() else (written[1], int(written[2]))

    def launch_id(self) -> str:
        """Id of the latest launch that has started; empty if none has."""
        return self.read(self.launch_folder / "launch_id").strip()

    def reason(self) -> str:
        """Why its job made no further attempt, if that is not obvious; empty otherwise."""
        text = self.read(self.launch_folder / "reason").strip()
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

    def attempts(self) -> list[list[str]]:
        """Ended attempts: time, job.restart, exit code, step before, step after, retries spent."""
        lines = self.read(self.launch_folder / "attempts.tsv").splitlines()
        return [words for line in lines if len(words := line.split("\t")) == 6]

    def cancel(self) -> list[str]:
        """Cancel its jobs; the ids of those that had not ended.

        Raises:
            NoAnswer: Slurm does not respond; nothing was changed.
            UserError: its jobs could not be cancelled.
        """
        try:
            jobs = list(self.queued())
        except NoAnswer as error:
            raise NoAnswer(f"{self.name} is not cancelled: {error}") from None
        if not jobs:
            return []
        self.run(["mkdir", "-p", str(self.launch_folder)])
        self.run(["touch", str(self.launch_folder / "cancelled")])
        try:
            self.run(["scancel", *jobs])
        except UserError as error:
            raise UserError(
                f"{error}\n{self.name} is not cancelled: job {', '.join(jobs)} keeps running, though no other attempt "
                f"will begin. Call `g2rl cancel {self.name}` again"
            ) from None
        return jobs

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
                ended = self.outcome()  # the job may have ended between the two queries
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
        """Whether `g2rl cancel` or scancel ended it."""
        if self.try_run(["ls", str(self.launch_folder / "cancelled")]):
            return True
        return self.slurm_state().startswith("CANCELLED")

    def slurm_state(self) -> str:
        """Slurm's state of the latest job (TIMEOUT, NODE_FAIL, ...); empty if Slurm no longer knows the job.

        From accounting, or from the controller, which keeps it for a few minutes after the job's end.
        """
        jobs = self.jobs()
        if not jobs:
            return ""
        if state := self.try_run(["sacct", "-nXP", "-oState", f"-j{jobs[-1]}"]).split("\n")[0].strip():
            return state
        shown = re.search(r"JobState=(\S+)", self.try_run(["scontrol", "show", "job", "--oneliner", jobs[-1]]))
        return shown[1] if shown else ""

    def is_known_to_be_over(self) -> bool:
        """Whether a run without queued jobs and outcome is over: cancelled, or saved and stopped by its last job."""
        attempts, jobs = self.attempts(), self.jobs()
        last = attempts[-1][1].split(".")[0] if attempts else ""
        return self.was_cancelled() or self.segments_used_up() and [last] == jobs[-1:]

    def segments_used_up(self) -> bool:
        """Whether its last attempt saved and stopped; if nothing is queued, relaunching resumes it."""
        attempts = self.attempts()
        return bool(attempts) and attempts[-1][2] == str(STOPPED) and not self.unfinished_attempt()

    def unfinished_attempt(self) -> str:
        """The attempt (job.restart) that started but has not recorded how it ended; empty if there is none."""
        return self.read(self.launch_folder / "running").strip()


def slurm_hint(message: str) -> str:
    """A hint to append to Slurm's message about a missing configuration; empty for other messages."""
    if "configuration source" not in message:
        return ""
    return (
        "\nSlurm's commands find no cluster: SLURM_CONF is not set, or is not a file. "
        'eval "$(launch/local_slurm/up.sh)" sets it for the local Slurm'
    )


def cancel(run: LaunchedRun) -> str:
    """Cancel a run; a message about what was done.

    Raises:
        UserError: as `LaunchedRun.cancel`.
    """
    jobs = run.cancel()
    if jobs:
        return f"{run.name}: cancelled {', '.join(jobs)}"
    if not run.jobs():  # a rendered script, submitted manually
        return f"{run.name}: none of its jobs has started; scancel --name={run.name} cancels one that is queued"
    return f"{run.name}: none of its jobs is queued or running"
