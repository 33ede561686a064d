"""Show the state and the output of launched runs, and wait for them.

For days if needed, and also while Slurm does not respond. Logs are copied in pieces, as they may not fit in memory.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, TypeVar

from rich.table import Table

from g2rl_launch.run import SILENT, Attempt, LaunchedRun, Queue, QueuedJob, find
from g2rl_launch.ssh import NoAnswer, Tunnel
from megatron_g2rl.config.run_files import STOPPED
from megatron_g2rl.errors import UserError

POLL_S = 3.0
"""Seconds between checks of a run's files."""
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
    """Call `look` every `pause_s()` seconds until it returns something; it may raise NoAnswer for as long as it takes.

    `say` is called with a message when Slurm stops responding, and when it recovers.
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

        Raises NoAnswer if Slurm does not respond.
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

    Raises UserError if its jobs are gone without an outcome.
    """
    watch = Watch(run)

    def look() -> int | None:
        over = watch.is_over()
        if ended := run.outcome():
            return ended[1]
        if not over:
            return None
        if run.was_cancelled():
            return 1
        if run.segments_used_up():
            return STOPPED
        accounting = ["sacct", "-nXP", "-oJobID,State,ExitCode", f"-j{','.join(run.submitted or run.jobs())}"]
        states = ", ".join(run.tunnel.try_run(accounting).splitlines()) or "no accounting"
        raise UserError(
            f"the jobs of {run.name} are gone and left no outcome ({states}): cancelled, or at their time limit before "
            f"they could save; look at {run.launch_folder}"
        )

    return poll(look, say, lambda: POLL_S)


@dataclass(frozen=True)
class RunStatus:
    """What is shown of a run: its state (in a sweep also waiting or not launched) and ids of its active jobs.

    `progress` is that of the trainer (`LaunchedRun.step`); `note` says in one line why the run failed or waits, why its
    state is unknown, or how healthy it is.
    """

    state: str
    jobs: tuple[str, ...] = ()
    latest_job: str = "-"
    progress: Mapping[str, Any] = field(default_factory=dict)
    attempts: Sequence[Attempt] = ()
    note: str = ""

    @property
    def spent(self) -> str:
        """Retries used up."""
        return self.attempts[-1].spent if self.attempts else "0"

    @property
    def is_active(self) -> bool:
        """Whether it is queued or running."""
        return bool(self.jobs) or self.state == "running"


def look_at(run: LaunchedRun, queue: Queue) -> RunStatus:
    """The status of a run, given the jobs in the queue."""
    state = run.state(queue)
    try:
        queued = {} if state == SILENT or run.outcome() else run.queued(queue)
        latest = (list(queued) or run.jobs() or ["-"])[-1]
        status = RunStatus(state, tuple(queued), latest, run.step(), run.attempts())
        note = queue.problem if state == SILENT else _note(run, status, next(iter(queued.values()), None))
        return replace(status, note=_in_a_line(note))
    except NoAnswer as error:
        return RunStatus(state, note=_in_a_line(str(error)))


def status(names: Sequence[str]) -> tuple[Table, list[str]]:
    """A table with the state of each run, given by its name or folder, and the notes on them.

    Raises UserError if one was never launched.
    """
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "phase", "last update", "attempts", "retries spent", "jobs"):
        table.add_column(title)
    queues: dict[Tunnel, Queue] = {}
    notes = []
    for run in [find(name) for name in names]:
        status = look_at(run, queues.setdefault(run.tunnel, Queue(run.tunnel)))
        progress = status.progress
        updated = _ago(time.time() - progress["time"]) if "time" in progress and status.state == "running" else "-"
        cells = [progress.get("step", "-"), progress.get("phase") or "-", updated, len(status.attempts), status.spent]
        table.add_row(run.name, status.state, *map(str, cells), " ".join(status.jobs) or status.latest_job)
        notes += [f"{run.name}: {status.note}"] * bool(status.note)
    return table, notes


def _note(run: LaunchedRun, status: RunStatus, job: QueuedJob | None) -> str:
    state, attempts, step = status.state, status.attempts, status.progress.get("step")
    if state.startswith("stopped"):
        return "it saved and stopped, and none of its jobs is queued; launch it again to resume"
    if state == "not submitted":
        return "none of its jobs has started"
    if state == "running":
        return status.progress.get("health", "")
    if state == "pending":
        reason = job.reason if job else ""
        texts = [f"waiting for {reason}" + (f": {REASONS[reason]}" if reason in REASONS else "")] if reason else []
        if attempts and attempts[-1].code not in ("0", str(STOPPED)):
            texts.append(f"attempt {len(attempts)} ended with {attempts[-1].code}: {why(run)}")
        return "; ".join(texts)
    if state == "lost" and (attempt := run.unfinished_attempt()):
        ended = run.slurm_state()
        text = f"job {attempt} was ended{f' ({ended})' if ended else ''} before it could save and record its outcome"
        text += ": raise stop_before_end_s" if ended.startswith("TIMEOUT") else ""
        text += "; launch it again to resume from its latest checkpoint"
        return text + (f" (it was at step {step})" if step else "")
    return why(run) if state.startswith(("failed", "lost")) else ""


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
    names = attempt_logs(run)
    lines = last_lines(run, names[-1], 50).splitlines() if names else []
    printed = [line for line in lines if line.strip() and not SLURMS_OWN.match(line)]
    return _in_a_line(run.reason() or (printed[-1] if printed else ""))


def last_error(run: LaunchedRun, lines: int = 30) -> str:
    """The end of the latest attempt's log, and why there was no other attempt."""
    try:
        names = attempt_logs(run)
        log = f"{names[-1]}:\n{last_lines(run, names[-1], lines).rstrip()}" if names else "no rank has printed anything"
        return "\n".join(filter(None, [log, run.reason()]))
    except NoAnswer as error:
        return str(error)


def _in_a_line(text: str) -> str:
    return " ".join(text.split())


_FIND_END = 'size=$(wc -c < "$1"); echo $((size - $(head -c "$size" "$1" | tail -n "$2" | wc -c)))'
"""Prints the number of bytes of file $1 before its last $2 lines."""


def show_logs(run: LaunchedRun, lines: int | None, into: BinaryIO) -> None:
    """Copy the output of all attempts, or their last `lines` lines together, each under a line that names it.

    Raises UserError if there is no log yet.
    """
    names = attempt_logs(run)
    if not names:
        raise UserError(f"{run.name} has no log yet: it is {run.state()}")
    page = _Page(into)
    if lines is None:
        for name in names:
            page.title(name)
            run.tunnel.stream(["cat", str(run.launch_folder / name)], page)
        return
    chosen: dict[str, str] = {}
    for name in reversed(names):
        chosen[name] = last_lines(run, name, lines)
        lines -= len(chosen[name].splitlines())
        if lines <= 0:
            break
    for name in reversed(chosen):
        page.title(name)
        page.write(chosen[name].encode())


def follow_logs(run: LaunchedRun, lines: int, into: BinaryIO, say: Callable[[str], None]) -> None:
    """Copy the output of a run until it has ended: the last `lines` lines of the latest attempt, and what follows.

    `say` is called with messages about the wait and the end of the run.
    """
    page, watch = _Page(into), Watch(run)
    shown: list[str] = []  # the log that is copied is the last one
    offset, reported = 0, False

    def copy() -> None:
        nonlocal offset
        before = page.copied
        with suppress(UserError):  # what was copied is counted, and the next poll continues from there
            run.tunnel.stream(["tail", "-c", f"+{offset + 1}", str(run.launch_folder / shown[-1])], page)
        offset += page.copied - before

    def look() -> bool | None:
        nonlocal offset, reported
        over = run.outcome() is not None or watch.is_over()  # before the log is read, so that the log is complete
        names = attempt_logs(run)
        if names and not shown:
            file = str(run.launch_folder / names[-1])
            offset = int(run.tunnel.run(["sh", "-c", _FIND_END, "sh", file, str(lines)]))
            shown.extend(names)
            page.title(names[-1])
        if shown:
            copy()
        for name in [name for name in names if name not in shown]:
            shown.append(name)
            page.title(name)
            offset = 0
            copy()
        into.flush()
        if not shown and not over and not reported:
            reported = True
            say(f"{run.name} is {run.state()}; waiting for its first output")
        return over or None

    poll(look, say, lambda: POLL_S)
    say(f"{run.name}: {run.state()}")


class _Page:
    """Writes the bytes of several logs; each title starts on a new line."""

    def __init__(self, into: BinaryIO):
        self._into = into
        self._at_start = True
        self.copied = 0

    def write(self, chunk: bytes) -> int:
        if chunk:
            self._at_start = chunk.endswith(b"\n")
        self.copied += len(chunk)
        return self._into.write(chunk)

    def title(self, name: str) -> None:
        self._into.write(b"" if self._at_start else b"\n")
        self._at_start = True
        self._into.write(f"==> {name} <==\n".encode())
