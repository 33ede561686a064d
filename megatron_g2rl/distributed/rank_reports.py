"""Reports from ranks to the command that started them: exit code, error messages, and the rank killed for silence.

They are files in a folder of the command, because torchrun only reports whether all ranks exited with 0.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from megatron_g2rl.config.command_line import CONFIGURATION_ERROR
from megatron_g2rl.config.world import launched_rank
from megatron_g2rl.errors import LOST_RANK_PREFIX

EXIT_CODE_FILE = "G2RL_EXIT_CODE_FILE"
"""Environment variable: file to which rank 0 writes the run's exit code."""

_PREFIX = "message_"
"""Prefix of the names of the files with the ranks' final messages."""

_FAILED = "failed_"
"""Prefix of the names of the empty files of ranks that end with an uncaught exception."""

_SILENT_RANK = "silent_rank"
"""Name of the file with the rank that was killed because it did not run."""


def is_reporting_process() -> bool:
    """Whether this process prints messages that are the same on all ranks: rank 0, or the process that starts ranks."""
    return launched_rank() == "0" and EXIT_CODE_FILE not in os.environ


def write_exit_code(code: int) -> None:
    """Pass the run's exit code to `run_ranks`: torchrun only reports whether all ranks exited with 0.

    It is that of rank 0, unless another rank has a configuration error, which ends rank 0 if it has not found it yet.
    """
    if (os.environ.get("RANK") == "0" or code == CONFIGURATION_ERROR) and EXIT_CODE_FILE in os.environ:
        with contextlib.suppress(OSError):  # a full disk, or the reader has ended and removed its folder
            Path(os.environ[EXIT_CODE_FILE]).write_text(str(code))


def read_exit_code() -> int | None:
    """The exit code that was passed to `run_ranks`, if any."""
    try:
        return int(Path(os.environ[EXIT_CODE_FILE]).read_text())
    except (KeyError, OSError, ValueError):
        return None


def discard_exit_code() -> None:
    """Remove the exit code that rank 0 wrote: another rank failed first, which determines the run's outcome."""
    if EXIT_CODE_FILE in os.environ:
        Path(os.environ[EXIT_CODE_FILE]).unlink(missing_ok=True)


def write_message(message: str) -> bool:
    """Pass the reason why this rank ends to `run_ranks`, which prints each distinct message once.

    Returns:
        Whether `run_ranks` prints the message. Rank 0 prints its own, except that another rank is lost: `run_ranks`
        prints this only if no rank reports the cause.
    """
    if EXIT_CODE_FILE not in os.environ:
        return False
    rank = int(os.environ.get("RANK", "0"))
    try:
        Path(os.environ[EXIT_CODE_FILE]).with_name(f"{_PREFIX}{rank:06d}").write_text(message)
    except OSError:  # a full disk, or the process that would print it has ended and removed its folder
        return False
    return rank != 0 or message.startswith(LOST_RANK_PREFIX)


def a_rank_has_reported() -> bool:
    """Whether a rank has failed and says why: torchrun then ends the other ranks."""
    if EXIT_CODE_FILE not in os.environ:
        return False
    folder = Path(os.environ[EXIT_CODE_FILE]).parent
    return any(path.name.startswith((_PREFIX, _FAILED)) for path in folder.glob("*"))


def mark_failed() -> None:
    """Record that this rank ends with an uncaught exception, whose traceback it prints itself."""
    if EXIT_CODE_FILE in os.environ:
        with contextlib.suppress(OSError):  # as in `write_exit_code`
            Path(os.environ[EXIT_CODE_FILE]).with_name(f"{_FAILED}{os.environ.get('RANK', '0')}").touch()


def write_silent_rank(rank: int) -> None:
    """Record which rank is killed because it did not run: the torchrun wrapper then does not report its death."""
    if EXIT_CODE_FILE in os.environ:
        with contextlib.suppress(OSError):  # as in `write_exit_code`
            Path(os.environ[EXIT_CODE_FILE]).with_name(_SILENT_RANK).write_text(str(rank))


def read_silent_rank() -> int | None:
    """The rank recorded by `write_silent_rank`, if any."""
    file = Path(os.environ.get(EXIT_CODE_FILE, "")).with_name(_SILENT_RANK) if EXIT_CODE_FILE in os.environ else None
    return int(file.read_text()) if file and file.is_file() else None


def print_other_ranks_messages(folder: Path) -> None:
    """Print every message that rank 0 has not printed, with the first rank that wrote it."""
    messages = {int(path.name.removeprefix(_PREFIX)): path.read_text() for path in folder.glob(f"{_PREFIX}*")}
    messages = {rank: message for rank, message in messages.items() if message}  # empty: the disk was full
    causes = [message for message in messages.values() if not message.startswith(LOST_RANK_PREFIX)]
    printed = {messages.pop(0)} if messages.get(0) in causes else set()
    for rank, message in sorted(messages.items()):
        # A lost connection to another rank is printed only if no rank reported a cause.
        if message not in printed and (message in causes or not causes):
            printed.add(message)
            print(message if rank == 0 else f"rank {rank}: {message}", file=sys.stderr, flush=True)
