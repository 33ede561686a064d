"""What `g2rl status` shows: how launched runs stand, a line each, and why the failed ones failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from megatron_g2rl.launch import registry
from megatron_g2rl.launch.logs import last_line
from megatron_g2rl.launch.runs import SILENT, LaunchedRun, NoAnswer


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
    for title in ("run", "state", "step", "phase", "attempts", "retries spent", "jobs"):
        table.add_column(title)
    queues, notes = Queues(), []
    for run in [registry.find(name) for name in names]:
        state = run.state(queues)
        try:
            cells, note = _cells(run, state, queues), _note(run, state, queues)
        except NoAnswer as error:
            cells, note = ["-"] * 5, _in_a_line(str(error))
        table.add_row(run.name, state, *cells)
        if note:
            notes.append(f"{run.name}: {note}")
    return table, notes


def _cells(run: LaunchedRun, state: str, queues: Queues) -> list[str]:
    where, attempts, jobs = run.step(), run.attempts(), run.jobs()
    under_way = list(run.queued(queues)) if state != SILENT and not run.outcome() else []
    spent = attempts[-1][-1] if attempts else "0"
    return [
        str(where.get("step", "-")),
        str(where.get("phase") or "-"),
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
    return why(run) if state.startswith(("failed", "lost")) else ""


def why(run: LaunchedRun) -> str:
    """Why a run has ended other than well, in a line: what its job made of it, else what a rank said last."""
    return _in_a_line(run.reason() or last_line(run))


def _in_a_line(text: str) -> str:
    return " ".join(text.split())
