"""What ranks leave for the command that started them: exit code, messages, which rank was killed for its silence.

Files in a folder of the command: torchrun only says whether all ranks ended with 0.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from megatron_g2rl.errors import LOST_RANK

EXIT_CODE_FILE = "G2RL_EXIT_CODE_FILE"
"""Environment variable: file in which rank 0 leaves the run's exit code."""

_MESSAGE = "message_"
"""What the names of the files begin with in which ranks leave why they ended."""

_SILENT = "silent_rank"
"""The name of the file that names the rank that was killed because it did not run."""


def speaks_for_all() -> bool:
    """Whether what all ranks find is this process's to say: the first, or the one that starts the ranks."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return rank == "0" and EXIT_CODE_FILE not in os.environ


def leave_exit_code(code: int) -> None:
    """Tell `run_ranks` the run's exit code: torchrun only says whether all ranks ended with 0."""
    if os.environ.get("RANK") == "0" and EXIT_CODE_FILE in os.environ:
        with contextlib.suppress(FileNotFoundError):  # who would read it is gone
            Path(os.environ[EXIT_CODE_FILE]).write_text(str(code))


def discard_exit_code() -> None:
    """Remove the exit code that rank 0 left: another rank was killed, which is the run's outcome."""
    if EXIT_CODE_FILE in os.environ:
        Path(os.environ[EXIT_CODE_FILE]).unlink(missing_ok=True)


def leave_message(message: str) -> bool:
    """Leave why this rank ends for `run_ranks`, which says it once: all ranks make the same mistakes.

    Returns:
        Whether there is a `run_ranks` that says it: for ranks but the first, which speaks for itself, at once.
    """
    if EXIT_CODE_FILE not in os.environ:
        return False
    rank = int(os.environ.get("RANK", "0"))
    try:
        Path(os.environ[EXIT_CODE_FILE]).with_name(f"{_MESSAGE}{rank:06d}").write_text(message)
    except FileNotFoundError:  # who would say it is gone
        return False
    return rank != 0


def leave_silent_rank(rank: int) -> None:
    """Tell the torchrun of `run_ranks` which rank is killed because it did not run: its death needs no message."""
    if EXIT_CODE_FILE in os.environ:
        with contextlib.suppress(FileNotFoundError):  # who would read it is gone
            Path(os.environ[EXIT_CODE_FILE]).with_name(_SILENT).write_text(str(rank))


def silent_rank() -> int | None:
    """The rank that was left by `leave_silent_rank`, if one was."""
    left = Path(os.environ.get(EXIT_CODE_FILE, "")).with_name(_SILENT) if EXIT_CODE_FILE in os.environ else None
    return int(left.read_text()) if left and left.is_file() else None


def say_what_others_left(folder: Path) -> None:
    """Every message that rank 0 has not said, with the first rank that left it."""
    left = {int(path.name.removeprefix(_MESSAGE)): path.read_text() for path in folder.glob(f"{_MESSAGE}*")}
    causes = [message for message in left.values() if not message.startswith(LOST_RANK)]
    said = {left.pop(0, None)}
    for rank, message in sorted(left.items()):
        # That a rank lost another one is worth a line only when that one could not say why.
        if message not in said and (message in causes or not causes):
            said.add(message)
            print(f"rank {rank}: {message}", file=sys.stderr, flush=True)
