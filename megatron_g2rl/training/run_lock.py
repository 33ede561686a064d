"""Prevents two processes from writing to one run folder, and detects that the folder was removed or replaced."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from megatron_g2rl.errors import UserError

log = logging.getLogger(__name__)

_NAME = "run.lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_HELD = (errno.EACCES, errno.EAGAIN)
"""Error numbers that POSIX allows for a lock held by another process."""


class RunIsBusy(UserError):
    """Another process writes to the run folder."""


class RunFolderLost(UserError):
    """The run folder was removed, moved or replaced while the run wrote to it."""


class RunLock:
    """Exclusive write access to a run folder, held by rank 0 until its process ends for any reason.

    A POSIX record lock: the kernel (on NFS and Lustre the server) releases it when the process dies, and forked
    processes, which may outlive this one, do not inherit it.
    """

    def __init__(self, folder: Path):
        """Acquire the lock of the run in `folder`, which must exist.

        Raises:
            RunIsBusy: another process holds the lock; the message names it.
            UserError: the file system failed; the message gives the cause.
        """
        self._folder = folder
        self._file = (folder / _NAME).open("a+", encoding="utf-8")
        try:
            _lock(self._file.fileno())
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise self._refusal(error) from error
            log.warning(
                "%s: the file system does not support locks (%s); make sure that no other run writes to this folder",
                *(folder, error.strerror),
            )
        self._file.truncate(0)
        who = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        job = os.environ.get("SLURM_JOB_ID")
        self._file.write(json.dumps(who | ({"slurm_job": job} if job else {})) + "\n")
        self._file.flush()

    def _refusal(self, error: OSError) -> UserError:
        """The error to raise for a lock that could not be acquired."""
        with self._file:
            if error.errno not in _HELD:
                return UserError(
                    f"{self._folder / _NAME} cannot be locked ({error.strerror}): the file system failed, and no other "
                    "run is known to use the folder. Fix the file system, or set run.directory to another one"
                )
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
        return RunIsBusy(
            f"{self._folder} is in use by another run ({holder}): wait for it or stop it, or choose another run.name"
        )

    def check(self) -> None:
        """Check, before a write, that the folder is still the one that was locked.

        Raises:
            RunFolderLost: the folder or its lock file was removed, moved or replaced.
        """
        try:
            same = os.path.samestat(os.stat(self._folder / _NAME), os.fstat(self._file.fileno()))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                raise
            same = False
        if not same:
            raise _lost(self._folder)


def check_folder(folder: Path) -> None:
    """Check that the run folder still exists; for ranks that do not hold its lock.

    Raises:
        RunFolderLost: the folder was removed or moved.
    """
    if not (folder / _NAME).exists():
        raise _lost(folder)


def _lost(folder: Path) -> RunFolderLost:
    return RunFolderLost(
        f"{folder} is no longer the folder of this run: it, or {_NAME} in it, was removed, moved or replaced while the "
        "run wrote to it. The run has ended and wrote nothing more; put the folder back to resume from it"
    )


def _lock(descriptor: int) -> None:
    """Acquire the record lock without waiting.

    Raises:
        OSError: another process holds it, or the file system failed.
    """
    while True:
        try:
            return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except InterruptedError:
            continue
