"""Prints the output of launched runs: the log of each attempt, copied in pieces, so that long logs fit in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

from g2rl_launch import monitor
from g2rl_launch.monitor import Watch, attempt_logs, last_lines, poll
from g2rl_launch.run import LaunchedRun
from megatron_g2rl.errors import UserError

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

    poll(look, say, lambda: monitor.POLL_S)
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
