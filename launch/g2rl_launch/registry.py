"""Find launched runs by name: a small file per run in the user's state folder records where the run is."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import Field

from g2rl_launch.run import LaunchedRun
from g2rl_launch.ssh import Tunnel
from megatron_g2rl.config.sections.base import Section
from megatron_g2rl.errors import UserError


class _Entry(Section):
    """Content of a launched run's file: the fields of LaunchedRun but its name."""

    run_folder: PurePosixPath
    tunnel: Tunnel
    jobs: tuple[Annotated[str, Field(pattern=r"^[0-9A-Za-z_.]+$")], ...] = ()
    earlier: str = ""


@contextmanager
def launching(name: str) -> Iterator[None]:
    """Hold the lock that lets only one process at a time launch a run of that name; UserError if another one does."""
    file = _file(name).with_suffix(".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{name} is being launched by another process; g2rl status {name}") from None
        except OSError:
            pass  # a file system without locks: attempts.sh refuses a second job
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def remember(run: LaunchedRun) -> None:
    """Record a launched run under its name, instead of an earlier one."""
    file = _file(run.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    entry = _Entry(run_folder=run.run_folder, tunnel=run.tunnel, jobs=run.submitted, earlier=run.earlier)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(entry.model_dump_json() + "\n")
    partial.replace(file)


def remembered(name: str) -> LaunchedRun | None:
    """The run that was last launched from this machine under that name; None if there is none.

    Raises UserError if its file is invalid.
    """
    file = _file(name)
    if not file.is_file():
        return None
    try:
        entry = _Entry.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        problem = str(error).splitlines()[0]
        remedy = "remove it, and name the run by its folder"
        raise UserError(f"{file} is not a record of a launched run ({problem}); {remedy}") from None
    return LaunchedRun(name, entry.run_folder, entry.tunnel, entry.jobs, entry.earlier)


def known(run: LaunchedRun) -> LaunchedRun | None:
    """The run as it was last launched from this machine; None if it was not, or another one of that name was."""
    before = remembered(run.name)
    return before if before and (before.run_folder, before.tunnel) == (run.run_folder, run.tunnel) else None


def find(name: str) -> LaunchedRun:
    """The launched run of that name, or the run in that folder; UserError, with the nearest names, if there is none."""
    if "/" not in name and (run := remembered(name)):
        return run
    folder = Path(name).resolve()
    if (folder / "launch").is_dir():
        return LaunchedRun(folder.name, PurePosixPath(folder), Tunnel())
    nearest = get_close_matches(name, names(), n=3) or names()[:3]
    raise UserError(
        f"no run {name} was launched from here; the nearest names are: {', '.join(nearest) or 'none'}. "
        "`g2rl launch CONFIG --cluster PROFILE` launches one; for a run that was launched from another machine, give "
        "its folder, the one that contains `launch`: g2rl status FOLDER"
    )


def names() -> list[str]:
    """Names of the launched runs, the latest first."""
    files = sorted(_folder().glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.stem for file in files]


def _file(name: str) -> Path:
    return _folder() / f"{name}.json"


def _folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "g2rl" / "launched"
