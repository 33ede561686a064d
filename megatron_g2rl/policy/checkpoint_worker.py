"""Writes a rank's part of a checkpoint and computes its checksums, in this process or in one forked from it.

The forked process sees memory as it was at the fork (copy on write), so training may go on meanwhile. It dies with the
rank, whatever kills that, and it leaves signals to it. Its outcome comes back through an anonymous file in memory that
only the two of them hold: there is no helper process that could stay behind.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import queue
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_g2rl.policy import manifest

_PR_SET_PDEATHSIG = 1
_prctl = getattr(ctypes.CDLL(None), "prctl", None)


@dataclass
class Outcome:
    """What became of a rank's part."""

    results: list = field(default_factory=list)
    """torch's WriteResults: where each tensor lies."""
    files: dict[str, dict] = field(default_factory=dict)
    """Checksums by path relative to the checkpoint."""
    error: str | None = None
    """Why it could not be written."""


class Mailbox:
    """Carries one `Outcome` from a forked process to the one that forked it."""

    def __init__(self):
        self._file = os.fdopen(os.memfd_create("checkpoint"), "w+b") if hasattr(os, "memfd_create") else None
        if self._file is None:
            import tempfile

            self._file = tempfile.TemporaryFile()

    def put(self, outcome: Outcome) -> None:
        """Leave the outcome; once, before the process ends."""
        pickle.dump(outcome, self._file)
        self._file.flush()

    def get(self) -> Outcome:
        """The outcome; an error in it when the process ended without leaving one."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            return Outcome(error="the process that wrote it was killed: was there enough memory?")
        finally:
            self._file.close()


class _NoCount:
    """megatron counts its writer processes with a queue; here they are threads that are joined."""

    def get(self) -> None:
        pass

    def task_done(self) -> None:
        pass


@dataclass(frozen=True)
class Part:
    """What one rank writes."""

    folder: Path
    """The checkpoint, still under its other name."""
    extra: Callable[[], None] | None
    """Writes the small files, on the first rank, before the tensors."""
    transforms: Any
    """torch's transforms of the stream (none)."""
    parent: int
    """Process id of the rank."""

    def write(self, rank: int, buckets: list, mailbox: Mailbox) -> None:
        """Write the files and their checksums, and leave the `Outcome` in the mailbox; never raises.

        Args:
            rank: for megatron's messages.
            buckets: megatron's (path, name, (bytes, tensors)), one a file.
            mailbox: where the outcome goes.
        """
        if os.getpid() != self.parent:
            self._follow_parent()
        try:
            outcome = self._write(buckets)
        except Exception as error:
            outcome = Outcome(error=_reason(error))
        mailbox.put(outcome)

    def _follow_parent(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        if _prctl is not None:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.parent:
            os._exit(1)  # it died before the line above

    def _write(self, buckets: list) -> Outcome:
        outcome = Outcome()
        if self.extra:
            self.extra()
            outcome.files = manifest.checksums(self.folder)
        if buckets:
            with ThreadPoolExecutor(len(buckets)) as threads:
                for results, name, entry in threads.map(self._write_bucket, buckets):
                    outcome.results += results
                    outcome.files[name] = entry
        return outcome

    def _write_bucket(self, bucket: tuple) -> tuple[list, str, dict]:
        answers: queue.SimpleQueue = queue.SimpleQueue()
        FileSystemWriterAsync.write_preloaded_data(self.transforms, 0, bucket, answers, _NoCount(), use_fsync=True)
        _, results = answers.get()
        if isinstance(results, Exception):
            raise results
        path = Path(bucket[0])
        return results, path.relative_to(self.folder).as_posix(), manifest.checksum(path)


def _reason(error: BaseException) -> str:
    """What an error says; the operating system's where torch reports only what followed from it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}" if cause is None else str(cause)
