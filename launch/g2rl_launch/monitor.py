"""Show the state of launched runs, and wait for them: for days if needed, and also while Slurm does not respond."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rich.table import Table

from g2rl_launch import registry
from g2rl_launch.run import SILENT, Attempt, LaunchedRun, Queue, QueuedJob
from g2rl_launch.ssh import NoAnswer, Tunnel
from megatron_g2rl.config.run_files import STOPPED
from megatron_g2rl.errors import UserError

POLL_S = 3.0
"""Seconds between looks at the files of a run."""
GONE_S = 60.0
"""Seconds without a job and an outcome after which a run counts as lost: over NFS a new file may appear late."""
SLURMS_OWN = re.compile(r"(srun|slurmstepd[^ :]*|g2rl launch): ")
"""Start of lines in a log that no rank printed."""
REASONS = {
    "BeginTime": "a requeued job waits two minutes",
    "PartitionNodeLimit": "it requests more nodes than the partition allows, and would wait forever",
    "PartitionTimeLimit": "its time is above the partition's limit, and it would wait forever",
    "JobHeldUser": "it is held; scontrol release JOB",
    "JobHeldAdmin": "it is held by an administrator",
}
"""Explanations of Slurm's reasons that require the user to act, or to wait."""
Found = TypeVar("Found")


class QueryInterval:
    """How often Slurm is queried: every few seconds at first, every half minute after ten minutes."""

    def __init__(self, shortest_s: float):
        self._shortest_s = shortest_s
        self._began = time.monotonic()

    def pause_s(self) -> float:
        """Seconds until the next query."""
        return min(30.0, max(self._shortest_s, (time.monotonic() - self._began) / 20))


def poll(look: Callable[[], Found | None], say: Callable[[str], None], pause_s: Callable[[], float]) -> Found:
    """Call `look` until it returns something.

    Args:
        look: returns None to be called again; may raise NoAnswer, for as long as it takes.
        say: called with a message when Slurm stops responding, and when it recovers.
        pause_s: seconds to wait before the next call.
    """
    problem = ""
    while True:
        try:
            found = look()
            if problem:
                say("Slurm is responding again")
            problem = ""
            if found is not None:
                return found
        except NoAnswer as error:
            if str(error) != problem:
                say(f"Slurm is not responding, retrying: {error}")
            problem = str(error)
        time.sleep(pause_s())


class Watch:
    """Checks, at a limited rate, whether a run can still continue."""

    def __init__(self, run: LaunchedRun):
        self._run, self._pace = run, QueryInterval(POLL_S)
        self._next_query = 0.0
        self._gone_since: float | None = None

    def is_over(self) -> bool:
        """Whether the run has had no jobs for so long that its outcome, if there is one, is visible.

        Raises:
            NoAnswer: Slurm does not respond.
        """
        now = time.monotonic()
        if now < self._next_query:
            return False
        gone_since, self._gone_since = self._gone_since, None
        if self._run.queued():
            self._next_query = now + self._pace.pause_s()
            return False
        self._gone_since = now if gone_since is None else gone_since
        # NFS checks for new files when a folder is opened.
        self._run.tunnel.try_run(["ls", str(self._run.launch_folder)])
        gone_s = now - self._gone_since
        return gone_s >= GONE_S or gone_s >= 3 * POLL_S and self._run.is_known_to_be_over()


def wait_for(run: LaunchedRun, say: Callable[[str], None]) -> int:
    """Wait for a submitted run's outcome; its exit code. `say` is called as by `poll`.

    Raises:
        UserError: its jobs are gone without an outcome.
    """
    watch = Watch(run)

    def look() -> int | None:
        over = watch.is_over()
        if ended := run.outcome():
            return ended[1]
        return _code_without_outcome(run) if over else None

    return poll(look, say, lambda: POLL_S)


def _code_without_outcome(run: LaunchedRun) -> int:
    if run.was_cancelled():
        return 1
    if run.segments_used_up():
        return STOPPED
    accounted = ["sacct", "-nXP", "-oJobID,State,ExitCode"]
    states = [run.tunnel.try_run([*accounted, f"-j{job}"]).strip() for job in run.submitted or run.jobs()]
    raise UserError(
        f"the jobs of {run.name} are gone and left no outcome ({', '.join(filter(None, states)) or 'no accounting'}): "
        f"cancelled, or at their time limit before they could save; look at {run.launch_folder}"
    )


@dataclass(frozen=True)
class RunStatus:
    """What is shown of a run."""

    state: str
    """As `LaunchedRun.state`; in a sweep also waiting (queued behind others) and not launched."""
    jobs: tuple[str, ...] = ()
    """Ids of its jobs that are queued or running."""
    latest_job: str = "-"
    """Id of its latest job."""
    progress: Mapping[str, Any] = field(default_factory=dict)
    """As `LaunchedRun.step`."""
    attempts: Sequence[Attempt] = ()
    """Its ended attempts."""
    note: str = ""
    """Why it failed or waits, why its state is unknown, or its health; one line."""

    @property
    def spent(self) -> str:
        """Retries used up."""
        return self.attempts[-1].spent if self.attempts else "0"

    @property
    def is_active(self) -> bool:
        """Whether it is queued or running."""
        return bool(self.jobs) or self.state == "running"


def look_at(run: LaunchedRun, queue: Queue) -> RunStatus:
    """The status of a run, given its jobs in the queue."""
    state = run.state(queue)
    try:
        queued = {} if state == SILENT or run.outcome() else run.queued(queue)
        latest = (list(queued) or run.jobs() or ["-"])[-1]
        progress, attempts = run.step(), run.attempts()
        note = _note(run, state, queue, queued, progress, attempts)
    except NoAnswer as error:
        return RunStatus(state, note=_in_a_line(str(error)))
    return RunStatus(state, tuple(queued), latest, progress, attempts, note)


def status(names: Sequence[str]) -> tuple[Table, list[str]]:
    """A table with the state of each run, and the notes on them.

    Args:
        names: names of launched runs, or their folders.

    Raises:
        UserError: one was never launched.
    """
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "phase", "last update", "attempts", "retries spent", "jobs"):
        table.add_column(title)
    queues: dict[Tunnel, Queue] = {}
    notes = []
    for run in [registry.find(name) for name in names]:
        status = look_at(run, queues.setdefault(run.tunnel, Queue(run.tunnel)))
        progress = status.progress
        updated = _ago(time.time() - progress["time"]) if "time" in progress and status.state == "running" else "-"
        cells = [progress.get("step", "-"), progress.get("phase") or "-", updated, len(status.attempts), status.spent]
        table.add_row(run.name, status.state, *map(str, cells), " ".join(status.jobs) or status.latest_job)
        notes += [f"{run.name}: {status.note}"] * bool(status.note)
    return table, notes


def _note(
    run: LaunchedRun,
    state: str,
    queue: Queue,
    queued: Mapping[str, QueuedJob],
    progress: Mapping[str, Any],
    attempts: Sequence[Attempt],
) -> str:
    if state == SILENT:
        return queue.problem
    if state.startswith("stopped"):
        return "it saved and stopped, and none of its jobs is queued; launch it again to resume"
    if state == "not submitted":
        return "none of its jobs has started"
    if state == "pending":
        return _why_pending(run, next(iter(queued.values())).reason if queued else "", attempts)
    if state == "lost" and (attempt := run.unfinished_attempt()):
        return _how_interrupted(attempt, run.slurm_state(), progress.get("step"))
    if state == "running":
        return _in_a_line(progress.get("health", ""))
    return why(run) if state.startswith(("failed", "lost")) else ""


def _why_pending(run: LaunchedRun, reason: str, attempts: Sequence[Attempt]) -> str:
    text = f"waiting for {reason}" + (f": {REASONS[reason]}" if reason in REASONS else "") if reason else ""
    if attempts and attempts[-1].code not in ("0", str(STOPPED)):
        text += f"{'; ' if text else ''}attempt {len(attempts)} ended with {attempts[-1].code}: {why(run)}"
    return text


def _how_interrupted(attempt: str, slurm_state: str, step: int | None) -> str:
    status = f" ({slurm_state})" if slurm_state else ""
    text = f"job {attempt} was ended{status} before it could save and record its outcome"
    if slurm_state.startswith("TIMEOUT"):
        text += ": raise stop_before_end_s"
    at = f" (it was at step {step})" if step else ""
    return f"{text}; launch it again to resume from its latest checkpoint{at}"


def _ago(seconds: float) -> str:
    """`75 s ago`, `12 min ago`, `3 h ago`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{max(0, int(seconds))} s ago"


def attempt_logs(run: LaunchedRun) -> list[str]:
    """Names of the logs of all attempts, the oldest first."""
    names = run.tunnel.try_run(["ls", "-1tr", str(run.launch_folder)]).splitlines()
    return [name for name in names if re.fullmatch(r"log-.*\.out", name)]


def last_lines(run: LaunchedRun, name: str, lines: int) -> str:
    """The end of an attempt's log."""
    return run.tunnel.try_run(["tail", "-n", str(lines), str(run.launch_folder / name)])


def why(run: LaunchedRun) -> str:
    """Why a run failed, in one line: the reason that its job recorded, else the last line of a rank."""
    if reason := run.reason():
        return _in_a_line(reason)
    names = attempt_logs(run)
    lines = last_lines(run, names[-1], 50).splitlines() if names else []
    printed = [line for line in lines if line.strip() and not SLURMS_OWN.match(line)]
    return _in_a_line(printed[-1]) if printed else ""


def last_error(run: LaunchedRun, lines: int = 30) -> str:
    """The end of the latest attempt's log, and why there was no other attempt."""
    try:
        names = attempt_logs(run)
        if not names:
            return "\n".join(filter(None, ["no rank has printed anything", run.reason()]))
        return "\n".join(filter(None, [f"{names[-1]}:", last_lines(run, names[-1], lines).rstrip(), run.reason()]))
    except NoAnswer as error:
        return str(error)


def _in_a_line(text: str) -> str:
    return " ".join(text.split())
