"""Prints the output of launched runs: the log of each attempt, copied in pieces, so that long logs fit in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

from g2rl_launch.monitor import Watch, attempt_logs, last_lines
from g2rl_launch.run import LaunchedRun, NoAnswer
from megatron_g2rl.errors import UserError

POLL_S = 2.0


def show_logs(run: LaunchedRun, lines: int | None, into: BinaryIO) -> None:
    """Copy the output of all attempts, each under a line that names it.

    Args:
        run: the run.
        lines: number of last lines, over all attempts together; None: all.
        into: destination.

    Raises:
        UserError: there is no log yet.
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
    """Copy the output of a run until it has ended: that of the latest attempt, and of each later one.

    Args:
        run: the run.
        lines: number of last lines of the latest attempt to start with.
        into: destination.
        say: called with messages about the wait and the end of the run.
    """
    page, watch = _Page(into), Watch(run, say)
    seen: set[str] = set()
    name, offset, reported = "", 0, False
    while True:
        try:
            over = (
                run.outcome() is not None or watch.is_over()
            )  # checked before the log is read, so the log is complete
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
            if not name and not reported:
                reported = True
                say(f"{run.name} is {run.state()}; waiting for its first output")
        except NoAnswer as error:
            watch.no_answer(error)
        time.sleep(POLL_S)


def _copy_end(run: LaunchedRun, name: str, lines: int, page: _Page) -> int:
    """Copy the last lines of a log; the size of the log in bytes up to which it was copied."""
    file = str(run.launch_folder / name)
    size = int((run.try_run(["wc", "-c", file]).split() or ["0"])[0])
    run.stream(["sh", "-c", 'head -c "$1" "$2" | tail -n "$3"', "sh", str(size), file, str(lines)], page)
    return size


def _copy_from(run: LaunchedRun, name: str, offset: int, page: _Page) -> int:
    """Copy what was appended to a log; the number of bytes."""
    copied = page.copied
    with suppress(UserError):  # what was copied is counted, and the next poll continues from there
        run.stream(["tail", "-c", f"+{offset + 1}", str(run.launch_folder / name)], page)
    return page.copied - copied


class _Page:
    """Writes the bytes of several logs; each title starts on a new line."""

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
