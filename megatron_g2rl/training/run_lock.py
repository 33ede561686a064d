"""Keeps two processes from writing to the folder of one run, and notices when the folder is no longer the run's."""

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
"""What POSIX lets a lock that another process holds be reported as."""


class RunIsBusy(UserError):
    """Another process writes to the folder of the run."""


class RunFolderLost(UserError):
    """The folder of the run was removed, moved or replaced while the run wrote to it."""


class RunLock:
    """The right to write to a run's folder, held by rank 0 until its process ends, however it ends.

    A POSIX record lock: the kernel (on NFS and Lustre the server) gives it back when the process dies, and processes
    forked from it, which may outlive it, do not have it.
    """

    def __init__(self, folder: Path):
        """Take the lock of the run in `folder`, which exists.

        Raises:
            RunIsBusy: another process has it; the message says which.
            UserError: the file system failed; the message says how.
        """
        self._folder = folder
        self._file = (folder / _NAME).open("a+", encoding="utf-8")
        try:
            _lock(self._file.fileno())
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise self._refusal(error) from error
            log.warning(
                "%s: the file system gives no locks (%s); make sure that no other run writes there",
                *(folder, error.strerror),
            )
        self._file.truncate(0)
        who = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        job = os.environ.get("SLURM_JOB_ID")
        self._file.write(json.dumps(who | ({"slurm_job": job} if job else {})) + "\n")
        self._file.flush()

    def _refusal(self, error: OSError) -> UserError:
        """What a failed lock means."""
        with self._file:
            if error.errno not in _HELD:
                return UserError(
                    f"{self._folder / _NAME} cannot be locked ({error.strerror}): no other run is known to use the "
                    "folder, the file system has failed. Fix it, or set run.directory to another one"
                )
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
        return RunIsBusy(
            f"{self._folder} is in use by another run ({holder}): wait for it or stop it, or choose another run.name"
        )

    def check(self) -> None:
        """Make sure that the folder is still the one that was locked, before something is written to it.

        Raises:
            RunFolderLost: it was removed, moved or replaced, or its lock file was.
        """
        try:
            same = os.path.samestat(os.stat(self._folder / _NAME), os.fstat(self._file.fileno()))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                raise
            same = False
        if not same:
            raise _lost(self._folder)

    def release(self) -> None:
        """Give the right back."""
        self._file.close()


def check_folder(folder: Path) -> None:
    """Make sure that the folder of the run is there; for ranks that do not hold its lock.

    Raises:
        RunFolderLost: it was removed or moved.
    """
    if not (folder / _NAME).exists():
        raise _lost(folder)


def _lost(folder: Path) -> RunFolderLost:
    return RunFolderLost(
        f"{folder} is no longer the folder of this run: it, or {_NAME} in it, was removed, moved or replaced while the "
        "run wrote to it. The run has ended and wrote nothing more; put the folder back to resume from it"
    )


def _lock(descriptor: int) -> None:
    """Take the record lock or raise at once.

    Raises:
        OSError: another process has it, or the file system failed.
    """
    while True:
        try:
            return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except InterruptedError:
            continue
