"""Kill or stop each process of a small training run in turn, in every phase, and report what happens to the run.

    python tools/kills.py
    python tools/kills.py --processes torchrun,"rank 1" --phases rollout,update -- rollout.engine=vllm

Real processes, two ranks. For each kind of process, one run is disturbed once in every phase, in this order, and
resumed after each disturbance with the same command; no torchrun takes part in the last attempt and in the undisturbed
run, which nothing disturbs. The table shows the exit code of the command, the seconds until every process of the run
had ended (found by a marker in the environment, whatever their session or parent), whether the run's lock was free
then, and whether the result equals that of an undisturbed run (as in chaos.py). A process is killed with SIGKILL; one
named `... stopped` gets SIGSTOP and is never continued. Exit code 1 if a process survives, the lock is still held, or a
run ends differently.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from chaos import Different, arguments, compare, create_model, kill_family, next_log, read_status
from rich.table import Table

from megatron_g2rl.config.terminal import table_console
from tools.fuzz.forking import ForkedCommand, fork_ranks, wait_for_all

PHASES = (
    *("starting", "loading", "weight_sync", "rollout", "reward", "old_logprobs", "update"),
    *("export", "checkpoint", "evaluation"),
)
"""Phases of status.json; `starting`: the ranks are running, but status.json does not exist yet."""
PROCESSES = (
    *("command", "torchrun", "rank 0", "rank 1", "reward worker 0", "reward worker 1", "checkpoint worker 0"),
    *("checkpoint worker 1", "rank 0 stopped", "rank 1 stopped", "torchrun stopped"),
    *("reward worker 1 stopped", "checkpoint worker 1 stopped"),
)
"""Processes to kill or stop; the number of a worker is the rank that it belongs to."""
SETTINGS = [
    "trainer.ranks=2",
    "rollout.max_response_tokens=12",
    "trainer.tokens_per_microbatch=256",
    "checkpoint.every_steps=1",
    "checkpoint.export_hf_every=1",
    "evaluation.every_steps=1",
]
MARK = "G2RL_KILLS"
"""Environment variable that all processes of a run inherit."""
SILENT_S = 20
"""Seconds after which a stopped rank is reported (G2RL_SILENT_RANK_SECONDS)."""
LIMIT_S = 120.0
"""Timeout for a phase to begin, and for all processes to end, in seconds."""


@dataclass
class Row:
    """One row of the table."""

    process: str
    phase: str
    step: int
    code: str
    """Exit code of the command, or that the run continues."""
    seconds: float | None
    """Seconds until every process of the run had ended; None: the run continues."""
    survivors: list[str]
    """Command lines of the processes that did not end."""
    lock_free: bool
    last_log_line: str
    equal: str = ""


class Run:
    """One attempt of a run; a marker in the environment identifies its processes."""

    def __init__(self, folder: Path, name: str, overrides: list[str]) -> None:
        """Start or resume the run with torchrun."""
        self.folder, self.mark, self.log = folder / name, uuid.uuid4().hex, next_log(folder, name)
        self._known: dict[str, psutil.Process | None] = {}
        (self.folder / "status.json").unlink(missing_ok=True)
        variables = {MARK: self.mark, "OMP_NUM_THREADS": "1", "G2RL_SILENT_RANK_SECONDS": str(SILENT_S)}
        environment = variables | os.environ | variables
        self.command = ForkedCommand(arguments(folder, name, overrides), Path.cwd(), self.log, environment=environment)

    def processes(self) -> list[psutil.Process]:
        """All running processes of this attempt, without zombies."""
        running = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    running.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return running

    def find(self, name: str) -> psutil.Process | None:
        """The process of that name, None if it is not running; scans all processes only if it is not known yet."""
        if name.startswith("checkpoint worker"):  # short-lived
            return self._checkpoint_worker(self.find(f"rank {name[-1]}"))
        known = self._known.get(name)
        if known is None or not _is_alive(known):
            self._known[name] = self._search(name)
        return self._known[name]

    def _checkpoint_worker(self, rank: psutil.Process | None) -> psutil.Process | None:
        """The process that was forked from a rank and has the same command line."""
        try:
            children = Path(f"/proc/{rank.pid}/task/{rank.pid}/children").read_text().split() if rank else []
            line = Path(f"/proc/{rank.pid}/cmdline").read_bytes() if rank else b""
            return next(
                (psutil.Process(int(p)) for p in children if Path(f"/proc/{p}/cmdline").read_bytes() == line), None
            )
        except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
            return None

    def _search(self, name: str) -> psutil.Process | None:
        if name == "command":
            return psutil.Process(self.command.pid)
        kind, _, rank = name.rpartition(" ") if name[-1].isdigit() else (name, "", "")
        for process in self.processes():
            try:
                if _kind(process) == kind and rank in ("", process.environ().get("RANK", "")):
                    return process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return None

    def in_phase(self, phase: str, step: int) -> bool:
        """Whether the run is in `phase`, at `step` or later."""
        status = read_status(self.folder)
        if phase == "starting":
            return not status
        return status.get("phase") == phase and (phase == "loading" or status["step"] >= step)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kind(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    if "megatron_g2rl.rewards.worker" in line:
        return "reward worker"
    if "megatron_g2rl.distributed.torchrun" in line:
        return "torchrun"
    # Processes forked from a rank have its command line, but their parent is not torchrun.
    return "rank" if "megatron_g2rl.distributed.torchrun" in " ".join(process.parent().cmdline()) else line


def wait_until(condition: Callable[[], object], command_: ForkedCommand) -> object:
    """The first true result of `condition`; None if the run ends first or the timeout passes."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        if result := condition():
            return result
        if command_.poll() is not None:
            return None
        time.sleep(0.0005)
    return None


def disturb(run: Run, name: str, phase: str, step: int) -> bool:
    """Kill or stop a process of the run in a phase; return whether that succeeded."""
    number, target = signal.SIGSTOP if name.endswith(" stopped") else signal.SIGKILL, name.removesuffix(" stopped")

    def attempt() -> psutil.Process | None:
        process, rank_0 = run.find(target), run.find("rank 0")
        if not process or not rank_0 or not run.in_phase(phase, step):
            return None
        try:
            rank_0.suspend()  # it writes status.json: the phase cannot change until it runs again
            hit = run.in_phase(phase, step)
            if hit:
                process.send_signal(number)
            if not hit or process != rank_0:
                rank_0.resume()
        except psutil.NoSuchProcess:
            return None
        return process if hit else None

    return wait_until(attempt, run.command) is not None


def outcome(run: Run, name: str, phase: str, step: int, *, continues: bool) -> Row:
    """Wait until all processes of the run have ended; the row of the table."""
    start = time.monotonic()
    if continues and run.command.poll() is None:
        return Row(name, phase, step, "run continues", None, [], True, "")
    while run.command.poll() is None or run.processes():
        if time.monotonic() > start + LIMIT_S:
            break
        time.sleep(0.05)
    seconds, survivors = time.monotonic() - start, [" ".join(p.cmdline())[:80] for p in run.processes()]
    code = run.command.poll()
    if survivors or code is None:
        kill_family(run.command)
        for process in run.processes():
            process.kill()
    lines = run.log.read_text().splitlines()
    return Row(name, phase, step, str(code), seconds, survivors, _lock_is_free(run.folder), lines[-1] if lines else "")


def _lock_is_free(folder: Path) -> bool:
    if not (folder / "run.lock").exists():
        return True
    with (folder / "run.lock").open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def disturb_in_every_phase(folder: Path, name: str, phases: list[str], overrides: list[str], show: Callable) -> None:
    """Disturb one run once in each phase, resume it each time, and compare its result at the end."""
    if name.startswith("checkpoint worker"):
        phases = [phase for phase in phases if phase == "checkpoint"]  # short-lived
    title, rows, run = name.replace(" ", "_"), [], None
    continues = name.startswith("reward worker")
    for step, phase in enumerate(phases):
        if run is None or run.command.poll() is not None or phase in ("starting", "loading"):
            if run is not None and run.command.poll() is None:
                kill_family(run.command)
            run = Run(folder, title, overrides)
        if disturb(run, name, phase, step):
            rows.append(outcome(run, name, phase, step, continues=continues))
        else:
            code = run.command.poll()
            rows.append(
                Row(
                    name,
                    phase,
                    step,
                    "not running in this phase" if code in (0, None) else str(code),
                    None,
                    [],
                    True,
                    "",
                )
            )
            if code is None:
                kill_family(run.command)
    if run is not None and run.command.poll() is None:
        code = run.command.wait(LIMIT_S * 2)
    elif run is None or run.command.poll() != 0:
        code = run_to_the_end(folder, title, overrides)
    else:
        code = 0
    try:
        if code:
            raise Different(f"the last attempt ended with exit code {code}")
        compare(folder, title)
        equal = "yes"
    except Different as error:
        equal = f"NO: {error}"
    for row in rows:
        row.equal = equal
        show(row)


def run_to_the_end(folder: Path, name: str, overrides: list[str]) -> int:
    """Start or resume a run without torchrun; the exit code of the rank that failed, or 0."""
    environment, log = {"OMP_NUM_THREADS": "1", **os.environ}, next_log(folder, name)
    ranks = fork_ranks(2, arguments(folder, name, overrides), Path.cwd(), log.with_suffix(".rank"), environment)
    return max(wait_for_all(ranks, LIMIT_S * 2), key=abs)


def cells(row: Row) -> list[str]:
    """The cells of a row."""
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    if row.survivors:
        seconds += f" STILL RUNNING: {row.survivors}"
    return [row.process, row.phase, row.code, seconds, "yes" if row.lock_free else "NO", row.equal]


def main() -> int:
    """Disturb, resume, compare; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", default=",".join(PROCESSES), help="processes to disturb, one after the other")
    parser.add_argument(
        "--phases", default=",".join(PHASES), help="phases, one after the other (checkpoint workers: `checkpoint` only)"
    )
    parser.add_argument("--folder", type=Path, default=None, help="folder of the runs, kept (default: a temporary one)")
    parser.add_argument("overrides", nargs="*", help="key=value overrides of the run's configuration")
    options = parser.parse_args()
    phases = options.phases.split(",")
    overrides = [*SETTINGS, f"trainer.steps={len(phases) + 2}", *options.overrides]
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="kills_"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    overrides += create_model(folder, overrides)
    header = ["process", "phase", "exit code", "all ended after (s)", "lock free", "same result after resuming"]
    table, rows = Table(*header), []
    (folder / "table.md").write_text(f"| {' | '.join(header)} |\n|{'---|' * len(header)}\n")

    def show(row: Row) -> None:
        rows.append(row)
        table.add_row(*cells(row))
        with (folder / "table.md").open("a") as file:
            file.write(f"| {' | '.join(cells(row))} |\n")
        print(" | ".join([*cells(row), row.last_log_line]), file=sys.stderr, flush=True)

    if run_to_the_end(folder, "undisturbed", overrides):
        raise SystemExit(f"the undisturbed run failed: {folder}/undisturbed.*")
    for name in options.processes.split(","):
        disturb_in_every_phase(folder, name, phases, overrides, show)
    table_console().print(table)
    failures = [row for row in rows if row.survivors or not row.lock_free or row.equal != "yes"]
    if options.folder is None and not failures:
        shutil.rmtree(folder)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
