"""Runs a case and decides whether the command failed in a way that no input may cause."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.fuzz.case import Work
from tools.fuzz.forking import RAISED, Outcome, run_forked
from tools.fuzz.seeds import Seeds, environment_of
from tools.fuzz.targets import TARGETS, target_of

LIMIT_S = 60.0
MEMORY_BYTES = 4 << 30
GRACE_S = 10.0
"""Seconds that a command's child processes have to end after it."""
CODES = (0, 1, 2, 75)
"""Exit codes: finished, runtime error, configuration error, stopped and resumable."""
_FRAME = re.compile(r'File ".*?/(megatron_g2rl/[^"]+)", line (\d+), in (\S+)')


@dataclass(frozen=True)
class Verdict:
    """Result of a case."""

    number: int
    target: str
    outcome: Outcome
    memory: int
    """Largest resident memory of all its processes, bytes."""
    failure: str
    """Why it failed, in one line; empty if it did not."""
    changes: int
    """Number of its changes."""


def run_case(seeds: Seeds, seed: int, number: int, folder: Path, kept: frozenset[int] | None = None) -> Verdict:
    """Create a case in an empty folder and run it; call `orphans.adopt_orphans` first, so that no process escapes.

    Args:
        seeds: valid files.
        seed, number: identify the case.
        folder: removed first.
        kept: indices of the changes to make; None: all.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = environment_of(folder)
    target = target_of(seed, number)
    work = Work(folder / "work", seeds, f"{seed}/{number}/{target}", kept)
    try:
        TARGETS[target][0](work)
    except Exception as error:  # two incompatible changes: the case is lost, but reported
        outcome = Outcome(0, traceback.format_exc(), 0.0)
        return Verdict(number, target, outcome, 0, f"the case cannot be created ({type(error).__name__}: {error})", 0)
    watch = _Watch()
    outcome = run_forked(
        work.arguments,
        work.folder,
        folder / "output.txt",
        limit_s=LIMIT_S,
        environment=environment | work.environment,
        before=work.before,
        watch=watch,
    )
    left = _end_descendants(0 if outcome.stopped else GRACE_S)
    (folder / "command.txt").write_text(f"{work.arguments!r}\n{outcome.code} in {outcome.seconds:.1f} s\n")
    failure = _failure(outcome, left, (work.folder / "executed").exists())
    return Verdict(number, target, outcome, watch.peak, failure, work.number_of_changes)


class _Watch:
    """Monitors the memory of all descendants of this process."""

    def __init__(self) -> None:
        self.peak = 0

    def __call__(self) -> str:
        used = sum(map(_resident, _descendants()))
        if used > MEMORY_BYTES:  # forked processes share pages: count them once
            used = sum(_proportional(process) for process in _descendants())
        self.peak = max(self.peak, used)
        return f"used {used / 2**30:.1f} GiB of memory" if used > MEMORY_BYTES else ""


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _proportional(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def _end_descendants(grace_s: float) -> list[str]:
    """Wait for the remaining processes of a case, then kill them; the command lines of those that were killed."""
    deadline = time.monotonic() + grace_s
    while True:
        _reap()
        left = _descendants()
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    names = [_command_line(process) for process in left]
    while left:
        for process in left:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.Error:
                pass
        time.sleep(0.02)
        _reap()
        left = _descendants()
    return names if grace_s else []


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120]
    except psutil.Error:
        return "a process"


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _failure(outcome: Outcome, left: list[str], executed: bool) -> str:
    """The first failure that no input may cause; the same cause gives the same text."""
    if executed:
        return "code of an input was executed"
    if outcome.stopped:
        return outcome.stopped
    if outcome.code < 0:
        return f"ended by {signal.Signals(-outcome.code).name}"
    if outcome.code == RAISED or "Traceback (most recent call last)" in outcome.text:
        return f"traceback: {_cause(outcome.text)}"
    if "Exception ignored" in outcome.text:
        return "an exception that Python ignored"
    if outcome.code not in CODES:
        return f"exit code {outcome.code}"
    if outcome.code and not outcome.text.strip():
        return f"exit code {outcome.code} without a message"
    if left:
        return f"left {len(left)} processes: {left[0]}"
    return ""


def _cause(text: str) -> str:
    """Type of the last exception and the innermost line of this package in its traceback."""
    last = text.rpartition("Traceback (most recent call last)")[2]
    frames = _FRAME.findall(last)
    where = "{}:{} {}".format(*frames[-1]) if frames else "no line of this package"
    kinds = re.findall(r"^([\w.]+(?:Error|Exception|Exit|Interrupt|Warning|Failure|Panic)[\w]*)(?=:|$)", last, re.M)
    return f"{kinds[-1] if kinds else last.strip().splitlines()[-1][:60]} at {where}"
