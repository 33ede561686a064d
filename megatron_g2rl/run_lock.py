"""Keeps two processes from writing to the folder of one run."""

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

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class RunIsBusy(UserError):
    """Another process writes to the folder of the run."""


class RunLock:
    """The right to write to a run's folder, held by rank 0 until its process ends, however it ends.

    A POSIX record lock: the kernel (on NFS and Lustre the server) gives it back when the process dies, and processes
    forked from it, which may outlive it, do not have it.
    """

    def __init__(self, folder: Path):
        """Take the lock of the run in `folder`, which exists.

        Raises:
            RunIsBusy: another process has it; the message says which.
        """
        self._file = (folder / "run.lock").open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                log.warning("%s: this file system has no locks; see to it that no other run writes here", folder)
                return
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise RunIsBusy(
                f"{folder} is in use by another run ({holder}): wait for it or stop it, or choose another run.name"
            ) from error
        self._file.truncate(0)
        who = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        job = os.environ.get("SLURM_JOB_ID")
        self._file.write(json.dumps(who | ({"slurm_job": job} if job else {})) + "\n")
        self._file.flush()

    def release(self) -> None:
        """Give the right back."""
        self._file.close()
