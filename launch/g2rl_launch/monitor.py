"""Show the state of launched runs, and wait for them: for days if needed, and also while Slurm does not respond."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from g2rl_launch import registry
from g2rl_launch.run import SILENT, LaunchedRun, NoAnswer
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


class QueryInterval:
    """How often Slurm is queried: every few seconds at first, every half minute after ten minutes."""

    def __init__(self, shortest_s: float = POLL_S, longest_s: float = 30.0):
        self._shortest_s, self._longest_s = shortest_s, longest_s
        self._began = time.monotonic()

    def pause_s(self) -> float:
        """Seconds until the next query."""
        return min(self._longest_s, max(self._shortest_s, (time.monotonic() - self._began) / 20))


class ResponseLog:
    """Reports once when Slurm stops responding and once when it recovers."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._reported = say, ""

    def no_answer(self, error: UserError) -> None:
        """Report that it does not respond, and why."""
        if str(error) != self._reported:
            self._reported = str(error)
            self._say(f"Slurm is not responding, retrying: {error}")

    def answer(self) -> None:
        """Note that it responds."""
        if self._reported:
            self._reported = ""
            self._say("Slurm is responding again")


class Watch:
    """Checks, at a limited rate, whether a run can still continue."""

    def __init__(self, run: LaunchedRun, say: Callable[[str], None]):
        self._run, self._pace, self._responses = run, QueryInterval(POLL_S), ResponseLog(say)
        self._next_query, self._gone_since = 0.0, -1.0

    def no_answer(self, error: NoAnswer) -> None:
        """Report that Slurm does not respond, so nothing is known about the run."""
        self._gone_since = -1.0
        self._responses.no_answer(error)

    def is_over(self) -> bool:
        """Whether the run has had no jobs for so long that its outcome, if there is one, is visible.

        Raises:
            NoAnswer: Slurm does not respond.
        """
        now = time.monotonic()
        if now < self._next_query:
            return False
        queued = self._run.queued()
        self._responses.answer()
        if queued:
            self._gone_since, self._next_query = -1.0, now + self._pace.pause_s()
            return False
        if self._gone_since < 0:
            self._gone_since = now
        self._run.try_run(["ls", str(self._run.launch_folder)])  # NFS checks for new files when a folder is opened
        gone_s = now - self._gone_since
        return gone_s >= GONE_S or gone_s >= 3 * POLL_S and self._run.is_known_to_be_over()


def wait_for(run: LaunchedRun, say: Callable[[str], None]) -> int:
    """Wait for a run's outcome; its exit code.

    Args:
        run: a submitted run.
        say: called with a message when Slurm stops responding, and when it recovers.

    Raises:
        UserError: its jobs are gone without an outcome.
    """
    watch = Watch(run, say)
    while True:
        try:
            over = watch.is_over()
            ended = run.outcome()
            if ended:
                return ended[1]
            if over:
                return _code_without_outcome(run)
        except NoAnswer as error:
            watch.no_answer(error)
        time.sleep(POLL_S)


def _code_without_outcome(run: LaunchedRun) -> int:
    if run.was_cancelled():
        return 1
    if run.segments_used_up():
        return STOPPED
    jobs = run.submitted or run.jobs()
    states = [run.try_run(["sacct", "-nXP", "-oJobID,State,ExitCode", f"-j{job}"]).strip() for job in jobs]
    raise UserError(
        f"the jobs of {run.name} are gone and left no outcome ({', '.join(filter(None, states)) or 'no accounting'}): "
        f"cancelled, or at their time limit before they could save; look at {run.launch_folder}"
    )


def attempt_logs(run: LaunchedRun) -> list[str]:
    """Names of the logs of all attempts, the oldest first."""
    names = run.try_run(["ls", "-1tr", str(run.launch_folder)]).splitlines()
    return [name for name in names if re.fullmatch(r"log-.*\.out", name)]


def last_lines(run: LaunchedRun, name: str, lines: int) -> str:
    """The end of an attempt's log."""
    return run.try_run(["tail", "-n", str(lines), str(run.launch_folder / name)])


def last_line(run: LaunchedRun) -> str:
    """The last line that a rank of the latest attempt printed."""
    names = attempt_logs(run)
    lines = last_lines(run, names[-1], 50).splitlines() if names else []
    printed = [line.strip() for line in lines if line.strip() and not SLURMS_OWN.match(line)]
    return printed[-1] if printed else ""


class Queues:
    """The queue of each Slurm cluster, read once for any number of runs."""

    def __init__(self) -> None:
        self._queues: dict[str, Mapping[str, str] | NoAnswer] = {}

    def __call__(self, run: LaunchedRun) -> Mapping[str, str]:
        """As `LaunchedRun.queue`.

        Raises:
            NoAnswer: that Slurm does not respond.
        """
        site = run.tunnel.model_dump_json()
        if site not in self._queues:
            try:
                self._queues[site] = run.queue()
            except NoAnswer as error:
                self._queues[site] = error
        queue = self._queues[site]
        if isinstance(queue, NoAnswer):
            raise queue
        return queue


def status(names: Sequence[str]) -> tuple[Table, list[str]]:
    """A table with the state of each run, and notes on them: why they failed, why their state is unknown, their health.

    Args:
        names: names of launched runs, or their folders.

    Raises:
        UserError: one was never launched.
    """
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "phase", "last update", "attempts", "retries spent", "jobs"):
        table.add_column(title)
    queues, notes = Queues(), []
    for run in [registry.find(name) for name in names]:
        state = run.state(queues)
        try:
            cells, note = _cells(run, state, queues), _note(run, state, queues)
        except NoAnswer as error:
            cells, note = ["-"] * 6, _in_a_line(str(error))
        table.add_row(run.name, state, *cells)
        if note:
            notes.append(f"{run.name}: {note}")
    return table, notes


def _cells(run: LaunchedRun, state: str, queues: Queues) -> list[str]:
    progress, attempts, jobs = run.step(), run.attempts(), run.jobs()
    queued = list(run.queued(queues)) if state != SILENT and not run.outcome() else []
    spent = attempts[-1][-1] if attempts else "0"
    updated = _ago(time.time() - progress["time"]) if "time" in progress and state == "running" else "-"
    return [
        str(progress.get("step", "-")),
        str(progress.get("phase") or "-"),
        updated,
        str(len(attempts)),
        spent,
        " ".join(queued or jobs[-1:]) or "-",
    ]


def _note(run: LaunchedRun, state: str, queues: Queues) -> str:
    if state == SILENT:
        try:
            run.queued(queues)
        except NoAnswer as error:
            return _in_a_line(str(error))
    if state.startswith("stopped"):
        return "it saved and stopped, and none of its jobs is queued; launch it again to resume"
    if state == "not submitted":
        return "none of its jobs has started"
    if state == "pending":
        return _why_pending(run, queues)
    if state == "lost" and run.unfinished_attempt():
        return _how_interrupted(run)
    if state == "running":
        return _in_a_line(run.step().get("health", ""))
    return why(run) if state.startswith(("failed", "lost")) else ""


def _why_pending(run: LaunchedRun, queues: Queues) -> str:
    shown = next(iter(run.queued(queues).values()), "")
    reason = shown.partition(" ")[2].strip("()")
    text = f"waiting for {reason}" + (f": {REASONS[reason]}" if reason in REASONS else "") if reason else ""
    attempts = run.attempts()
    if attempts and attempts[-1][2] not in ("0", str(STOPPED)):
        text += f"{'; ' if text else ''}attempt {len(attempts)} ended with {attempts[-1][2]}: {why(run)}"
    return text


def _how_interrupted(run: LaunchedRun) -> str:
    state, step = run.slurm_state(), run.step().get("step")
    status = f" ({state})" if state else ""
    text = f"job {run.unfinished_attempt()} was ended{status} before it could save and record its outcome"
    if state.startswith("TIMEOUT"):
        text += ": raise stop_before_end_s"
    at = f" (it was at step {step})" if step else ""
    return f"{text}; launch it again to resume from its latest checkpoint{at}"


def _ago(seconds: float) -> str:
    """`75 s ago`, `12 min ago`, `3 h ago`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{max(0, int(seconds))} s ago"


def why(run: LaunchedRun) -> str:
    """Why a run failed, in one line: the reason that its job recorded, else the last line of a rank."""
    return _in_a_line(run.reason() or last_line(run))


def _in_a_line(text: str) -> str:
    return " ".join(text.split())


def last_error(run: LaunchedRun, lines: int = 30) -> str:
    """The end of the latest attempt's log, and why there was no other attempt."""
    try:
        names = attempt_logs(run)
    except NoAnswer as error:
        return str(error)
    log = [f"{names[-1]}:", last_lines(run, names[-1], lines).rstrip()] if names else ["no rank has printed anything"]
    return "\n".join([*log, *filter(None, [run.reason()])])
