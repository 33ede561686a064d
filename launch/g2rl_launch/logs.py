"""What launched runs said: the log of each attempt, copied piece by piece; logs of days are not read into memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

from g2rl_launch.runs import LaunchedRun, NoAnswer
from g2rl_launch.waiting import Watch
from megatron_g2rl.errors import UserError

POLL_S = 2.0
SLURMS_OWN = re.compile(r"(srun|slurmstepd[^ :]*|g2rl launch): ")


def attempt_logs(run: LaunchedRun) -> list[str]:
    """Names of the logs of all attempts, the oldest first."""
    names = run.ask(["ls", "-1tr", str(run.launch_folder)]).splitlines()
    return [name for name in names if re.fullmatch(r"log-.*\.out", name)]


def last_lines(run: LaunchedRun, name: str, lines: int) -> str:
    """The end of an attempt's log."""
    return run.ask(["tail", "-n", str(lines), str(run.launch_folder / name)])


def last_line(run: LaunchedRun) -> str:
    """The last thing that a rank of the newest attempt said."""
    names = attempt_logs(run)
    said = last_lines(run, names[-1], 50).splitlines() if names else []
    own = [line.strip() for line in said if line.strip() and not SLURMS_OWN.match(line)]
    return own[-1] if own else ""


def show_logs(run: LaunchedRun, lines: int | None, into: BinaryIO) -> None:
    """Copy what all attempts said, each under a line that names it.

    Args:
        run: the run.
        lines: only so many lines, the last ones of all attempts together.
        into: takes it.

    Raises:
        UserError: there is none yet.
    """
    names = attempt_logs(run)
    if not names:
        raise UserError(f"{run.name} has no log yet: it is {run.state()}")
    page = _Page(into)
    if lines is None:
        for name in names:
            page.title(name)
            run.stream(["cat", str(run.launch_folder / name)], page)
        return
    chosen: list[tuple[str, str]] = []
    for name in reversed(names):
        text = last_lines(run, name, lines)
        chosen.append((name, text))
        lines -= len(text.splitlines())
        if lines <= 0:
            break
    for name, text in reversed(chosen):
        page.title(name)
        page.write(text.encode())


def follow_logs(run: LaunchedRun, lines: int, into: BinaryIO, say: Callable[[str], None]) -> None:
    """Copy what a run says until it has ended: the newest attempt, and each that begins after it.

    Args:
        run: the run.
        lines: so many lines of the newest attempt first.
        into: takes it.
        say: told what is waited for, and how the run has ended.
    """
    page, watch = _Page(into), Watch(run, say)
    seen: set[str] = set()
    name, offset, told = "", 0, False
    while True:
        try:
            over = run.outcome() is not None or watch.is_over()  # before the last look at the log, which is complete
            names = attempt_logs(run)
            if name:
                offset += _copy_from(run, name, offset, page)
            elif names:
                seen.update(names)
                name = names[-1]
                page.title(name)
                offset = _copy_end(run, name, lines, page)
            for newer in [newer for newer in names if newer not in seen]:
                name = newer
                seen.add(name)
                page.title(name)
                offset = _copy_from(run, name, 0, page)
            into.flush()
            if over:
                say(f"{run.name}: {run.state()}")
                return
            if not name and not told:
                told = True
                say(f"{run.name} is {run.state()}; waiting for its first words")
        except NoAnswer as error:
            watch.no_answer(error)
        time.sleep(POLL_S)


def _copy_end(run: LaunchedRun, name: str, lines: int, page: _Page) -> int:
    """Copy the last lines of a log; how long it was when they were read."""
    file = str(run.launch_folder / name)
    size = int((run.ask(["wc", "-c", file]).split() or ["0"])[0])
    run.stream(["sh", "-c", 'head -c "$1" "$2" | tail -n "$3"', "sh", str(size), file, str(lines)], page)
    return size


def _copy_from(run: LaunchedRun, name: str, offset: int, page: _Page) -> int:
    """Copy what a log has got since; how many bytes."""
    copied = page.copied
    with suppress(UserError):  # copied so far is counted, and the next look goes on from there
        run.stream(["tail", "-c", f"+{offset + 1}", str(run.launch_folder / name)], page)
    return page.copied - copied


class _Page:
    """Takes the bytes of several logs; titles begin on a line of their own."""

    def __init__(self, into: BinaryIO):
        self._into, self._at_start = into, True
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
