"""What `g2rl status` shows: how launched runs stand, a line each, and why the failed ones failed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.table import Table

from g2rl_launch import registry
from g2rl_launch.logs import last_line
from g2rl_launch.runs import SILENT, STOPPED, LaunchedRun, NoAnswer


class Queues:
    """Asks each Slurm once for its queue, however many runs are looked at."""

    def __init__(self) -> None:
        self._found: dict[str, Mapping[str, str] | NoAnswer] = {}

    def __call__(self, run: LaunchedRun) -> Mapping[str, str]:
        """As `LaunchedRun.queue`.

        Raises:
            NoAnswer: that Slurm does not answer.
        """
        site = run.tunnel.model_dump_json()
        if site not in self._found:
            try:
                self._found[site] = run.queue()
            except NoAnswer as error:
                self._found[site] = error
        found = self._found[site]
        if isinstance(found, NoAnswer):
            raise found
        return found


def status(names: Sequence[str]) -> tuple[Table, list[str]]:
    """How runs stand, a line each, and what else there is to say of them: why they failed, why nothing is known.

    Args:
        names: names of launched runs, or their folders.

    Raises:
        UserError: one was never launched.
    """
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "phase", "last heard", "attempts", "retries spent", "jobs"):
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
    where, attempts, jobs = run.step(), run.attempts(), run.jobs()
    under_way = list(run.queued(queues)) if state != SILENT and not run.outcome() else []
    spent = attempts[-1][-1] if attempts else "0"
    heard = _ago(time.time() - where["time"]) if "time" in where and state == "running" else "-"
    return [
        str(where.get("step", "-")),
        str(where.get("phase") or "-"),
        heard,
        str(len(attempts)),
        spent,
        " ".join(under_way or jobs[-1:]) or "-",
    ]


def _note(run: LaunchedRun, state: str, queues: Queues) -> str:
    if state == SILENT:
        try:
            run.queued(queues)
        except NoAnswer as error:
            return _in_a_line(str(error))
    if state.startswith("stopped"):
        return "it saved and stopped, and nothing more of it is queued; launched again, it goes on"
    if state == "not submitted":
        return "no job of the script that --render wrote has begun"
    if state == "pending":
        return _why_pending(run, queues)
    if state == "lost" and run.cut_off():
        return _how_cut_off(run)
    return why(run) if state.startswith(("failed", "lost")) else ""


REASONS = {
    "BeginTime": "a requeued job waits two minutes",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives, and would wait for ever",
    "PartitionTimeLimit": "its time is above the partition's limit, and it would wait for ever",
    "JobHeldUser": "it is held; scontrol release JOB",
    "JobHeldAdmin": "it is held by an administrator",
}
"""What Slurm's reasons mean where they need action, or patience."""


def _why_pending(run: LaunchedRun, queues: Queues) -> str:
    said = next(iter(run.queued(queues).values()), "")
    reason = said.partition(" ")[2].strip("()")
    text = f"waits for {reason}" + (f": {REASONS[reason]}" if reason in REASONS else "") if reason else ""
    attempts = run.attempts()
    if attempts and attempts[-1][2] not in ("0", str(STOPPED)):
        text += f"{'; ' if text else ''}attempt {len(attempts)} ended with {attempts[-1][2]}: {why(run)}"
    return text


def _how_cut_off(run: LaunchedRun) -> str:
    word, step = run.slurms_word(), run.step().get("step")
    text = f"job {run.cut_off()} was ended{f' ({word})' if word else ''} before it could save and write that down"
    if word.startswith("TIMEOUT"):
        text += ": raise stop_before_end_s"
    at = f" (it was at step {step})" if step else ""
    return f"{text}; launched again, it goes on from its newest checkpoint{at}"


def _ago(seconds: float) -> str:
    """`75 s ago`, `12 min ago`, `3 h ago`."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{max(0, int(seconds))} s ago"


def why(run: LaunchedRun) -> str:
    """Why a run has ended other than well, in a line: what its job made of it, else what a rank said last."""
    return _in_a_line(run.reason() or last_line(run))


def _in_a_line(text: str) -> str:
    return " ".join(text.split())
