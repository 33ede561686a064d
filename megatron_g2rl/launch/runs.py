"""Looks after launched runs by their names: how they stand, what all their attempts said, how to end them.

The folder `launch` of a run holds what its jobs wrote down (`attempts.sh`): job ids, attempts, outcome. A small file
for each name in the user's state folder says where that is and through which tunnel it is reached.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_g2rl.errors import UserError
from megatron_g2rl.launch.profiles import Tunnel

STOPPED = 75
"""Exit code of a run that was asked to stop and can be resumed (as in `stopping`, which imports torch)."""
POLL_S = 3.0
GONE_POLLS = 4
"""Looks in a row without a job and without an outcome after which a run counts as lost."""


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

    @property
    def launch_folder(self) -> PurePosixPath:
        """Where its attempts are counted and logged."""
        return self.run_folder / "launch"

    def read(self, file: PurePosixPath) -> str:
        """A file's text; empty when there is none."""
        return self.ask(["cat", str(file)])

    def ask(self, command: Sequence[str]) -> str:
        """Output of a command there; empty when it fails."""
        try:
            return self.demand(command)
        except UserError:
            return ""

    def demand(self, command: Sequence[str]) -> str:
        """Output of a command there.

        Raises:
            UserError: it failed; what it said.
        """
        try:
            done = subprocess.run(self._there(command), capture_output=True, text=True, errors="replace")
        except FileNotFoundError:
            raise UserError(f"{command[0]} is not on this machine") from None
        if done.returncode:
            raise UserError(f"{command[0]} failed: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def _there(self, command: Sequence[str]) -> list[str]:
        if self.tunnel.kind == "local":
            return list(command)
        user = [f"-l{self.tunnel.user}"] if self.tunnel.user else []
        identity = [f"-i{self.tunnel.identity}"] if self.tunnel.identity else []
        # One connection for the many small questions about a run.
        shared = ["-oControlMaster=auto", "-oControlPersist=60", "-oControlPath=~/.ssh/g2rl-%C"]
        return ["ssh", "-oBatchMode=yes", *shared, *user, *identity, "--", str(self.tunnel.host), shlex.join(command)]

    def jobs(self) -> list[str]:
        """Ids of its jobs, the oldest first."""
        written = [line for line in self.read(self.launch_folder / "jobs").split() if line.isdecimal()]
        return list(dict.fromkeys([*written, *self.submitted]))

    def queued(self) -> dict[str, str]:
        """State of those of its jobs that Slurm still has, by id."""
        jobs = self.jobs()
        if not jobs:
            return {}
        # One id that Slurm has forgotten would make it refuse the whole list.
        lines = self.ask(["squeue", "--noheader", "--me", "--format=%A %T %r"]).splitlines()
        found = dict(line.split(" ", 1) for line in lines if " " in line)
        return {job: found[job] for job in jobs if job in found}

    def outcome(self) -> tuple[str, int] | None:
        """How it ended (finished, failed, stopped, cancelled) with its exit code; None while it goes on."""
        words = self.read(self.launch_folder / "outcome").split()
        return (words[0], int(words[1])) if len(words) == 2 else None

    def reason(self) -> str:
        """Why its job made no other attempt, where that needs saying; empty otherwise."""
        return self.read(self.launch_folder / "reason").strip()

    def step(self) -> dict[str, Any]:
        """Where the trainer is: its status.json."""
        try:
            return json.loads(self.read(self.run_folder / "status.json"))
        except ValueError:
            return {}

    def attempts(self) -> list[list[str]]:
        """Ended attempts: time, job.restart, exit code, step before, step after, retries spent."""
        return [line.split("\t") for line in self.read(self.launch_folder / "attempts.tsv").splitlines()]

    def logs(self) -> Iterator[tuple[str, str]]:
        """Name and text of the log of each attempt, the oldest first."""
        names = self.ask(["ls", "-1tr", str(self.launch_folder)]).splitlines()
        for name in names:
            if re.fullmatch(r"log-.*\.out", name):
                yield name, self.read(self.launch_folder / name)

    def cancel(self) -> list[str]:
        """End its jobs for good; those that Slurm still had."""
        self.ask(["mkdir", "-p", str(self.launch_folder)])
        self.ask(["touch", str(self.launch_folder / "cancelled")])
        jobs = list(self.queued())
        if jobs:
            self.ask(["scancel", *jobs])
        return jobs

    def state(self) -> str:
        """One word or two: finished, failed (1), running, pending, lost."""
        ended = self.outcome()
        if ended:
            return ended[0] if ended[1] == 0 else f"{ended[0]} ({ended[1]})"
        queued = [state.split()[0].lower() for state in self.queued().values()]
        if queued:
            return "running" if "running" in queued else queued[0]
        if self.was_cancelled():
            return "cancelled"
        if self.segments_used_up():
            return f"stopped ({STOPPED})"
        return "lost" if self.jobs() else "unknown"

    def was_cancelled(self) -> bool:
        """Whether `g2rl cancel` ended it, or somebody's scancel."""
        if self.ask(["ls", str(self.launch_folder / "cancelled")]):
            return True
        jobs = self.jobs()
        return bool(jobs) and self._last_state(jobs[-1]).startswith("CANCELLED")

    def _last_state(self, job: str) -> str:
        """Slurm's word for how a job ended: accounting's, or for a few minutes the controller's; empty without both."""
        found = self.ask(["sacct", "-nXP", "-oState", f"-j{job}"]).split("\n")[0].strip()
        if found:
            return found
        shown = re.search(r"JobState=(\S+)", self.ask(["scontrol", "show", "job", "--oneliner", job]))
        return shown[1] if shown else ""

    def segments_used_up(self) -> bool:
        """Whether its last attempt saved and stopped; with nothing queued, launching it again goes on from there."""
        attempts = self.attempts()
        return bool(attempts) and attempts[-1][2] == str(STOPPED)

    def wait(self) -> int:
        """Wait for its outcome; the exit code.

        Raises:
            UserError: its jobs are gone without one.
        """
        gone = 0
        while gone < GONE_POLLS:
            ended = self.outcome()
            if ended:
                return ended[1]
            gone = 0 if self.queued() else gone + 1
            time.sleep(POLL_S)
        if self.was_cancelled():
            return 1
        if self.segments_used_up():
            return STOPPED
        asked = [self.ask(["sacct", "-nXP", "-oJobID,State,ExitCode", f"-j{job}"]).strip() for job in self.jobs()]
        states = ", ".join(filter(None, asked)) or "no accounting"
        raise UserError(
            f"the jobs of {self.name} are gone and left no outcome ({states}): cancelled, or at their time limit "
            f"before they could save; look at {self.launch_folder}"
        )


def remember(run: LaunchedRun) -> None:
    """Note a launched run under its name; an earlier one of that name is forgotten."""
    file = _registry() / f"{run.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    entry = {"run_folder": str(run.run_folder), "tunnel": run.tunnel.model_dump(mode="json"), "jobs": run.submitted}
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(entry) + "\n")
    partial.replace(file)


def find(name: str) -> LaunchedRun:
    """The launched run of that name, or the run in that folder (of a rendered script).

    Raises:
        UserError: there is none; names those there are.
    """
    if "/" not in name and (run := remembered(name)):
        return run
    if (Path(name) / "launch").is_dir():
        return LaunchedRun(Path(name).resolve().name, PurePosixPath(Path(name).resolve()), Tunnel())
    raise UserError(
        f"no run {name} was launched from here, and it is no folder of a launched run; "
        f"there are: {', '.join(names()) or 'none'}"
    )


def remembered(name: str) -> LaunchedRun | None:
    """What was last launched from here under that name."""
    file = _registry() / f"{name}.json"
    if not file.is_file():
        return None
    entry = json.loads(file.read_text())
    folder = PurePosixPath(entry["run_folder"])
    return LaunchedRun(name, folder, Tunnel.model_validate(entry["tunnel"]), tuple(entry["jobs"]))


def names() -> list[str]:
    """Names of the launched runs, the newest first."""
    files = sorted(_registry().glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.stem for file in files]


def _registry() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "g2rl" / "launched"
