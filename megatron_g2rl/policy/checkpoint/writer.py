"""Writes a rank's part of a checkpoint and computes its checksums, in this process or in a forked one.

The forked process sees memory as it was at the fork (copy on write), so training may continue meanwhile. It ends with
the rank, however the rank ends, and ignores signals, which the rank handles. It returns its outcome through an
anonymous in-memory file that only the two processes have open: no helper process can be left behind.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from megatron_g2rl.distributed.orphans import signal_when_parent_ends
from megatron_g2rl.policy.checkpoint import manifest
from megatron_g2rl.policy.checkpoint.plan import TorchDistWriter

STOPPED_S = 60.0
"""Seconds after which a stopped (SIGSTOP) process is killed, because every rank would wait for it."""
POLL_S = 2.0


@dataclass
class Outcome:
    """Result of writing a rank's part."""

    results: list = field(default_factory=list)
    """torch's WriteResults: where each tensor is."""
    files: dict[str, dict] = field(default_factory=dict)
    """Checksums by path relative to the checkpoint."""
    error: str | None = None
    """Why it could not be written."""


class ResultFile:
    """Carries one `Outcome` from a forked process to the one that forked it."""

    def __init__(self):
        self._file = os.fdopen(os.memfd_create("checkpoint"), "w+b")

    def put(self, outcome: Outcome) -> None:
        """Store the outcome; called once, before the process ends."""
        pickle.dump(outcome, self._file)
        self._file.flush()

    def get(self) -> Outcome:
        """The outcome; contains an error if the process ended without storing one."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            return Outcome(error="the writing process was killed (perhaps out of memory) or stopped for too long")
        finally:
            self._file.close()


class _Data(DefaultSavePlanner):
    """Provides torch's writer with the data of each item."""

    def __init__(self, tensors: Mapping[Any, Tensor], objects: Mapping[str, Any]):
        super().__init__()
        self.tensors, self.objects = tensors, objects

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            content = io.BytesIO()
            torch.save([self.objects[write_item.index.fqn]], content)
            return content
        return self.tensors[write_item.index].view(write_item.tensor_data.chunk.sizes)


@dataclass(frozen=True)
class ShardWriter:
    """Writes one rank's part of a checkpoint."""

    folder: Path
    """The checkpoint folder, still under its temporary name."""
    extra: Callable[[], None] | None
    """Writes the small files before the tensors; None except on rank 0."""
    writer: TorchDistWriter
    plan: SavePlan
    tensors: Mapping[Any, Tensor]
    """Tensors by index of the plan's items, in host memory."""
    objects: Mapping[str, Any]

    def write(self, parent: int, result: ResultFile) -> None:
        """Write the files, compute their checksums, and store the `Outcome`; never raises.

        Args:
            parent: process id of the rank.
            result: receives the outcome.
        """
        if os.getpid() != parent:
            _follow(parent)
        try:
            outcome = self._write()
        except Exception as error:
            outcome = Outcome(error=_reason(error))
        result.put(outcome)

    def _write(self) -> Outcome:
        outcome = Outcome()
        if self.extra:
            self.extra()
            outcome.files = manifest.checksums(self.folder)
        if self.plan.items:
            data = _Data(self.tensors, self.objects)
            outcome.results = self.writer.write_data(self.plan, data).value()
            names = {result.storage_data.relative_path for result in outcome.results}
            folder = Path(self.writer.path)
            for name in sorted(names):
                path = folder / name
                outcome.files[path.relative_to(self.folder).as_posix()] = manifest.checksum(path)
        return outcome


def _follow(parent: int) -> None:
    """Set up the forked process: end with the rank, ignore signals, start no threads."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal_when_parent_ends(parent, signal.SIGKILL)
    # A parallel region would wait forever for the threads that fork did not copy.
    torch.set_num_threads(1)


class BackgroundWrite:
    """Runs a `ShardWriter`, either to completion in this process or in a forked one."""

    def __init__(self, writer: ShardWriter, *, asynchronous: bool):
        """Write, or start writing.

        Args:
            writer: writes this rank's part.
            asynchronous: write in a forked process.
        """
        self.result = ResultFile()
        self._process: multiprocessing.Process | None = None
        if not asynchronous:
            writer.write(os.getpid(), self.result)
            return
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=writer.write, args=(os.getpid(), self.result))
        # The forked process must not finalize objects of this process, such as tensors on a GPU.
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._process.start()
        finally:
            if collecting:
                gc.enable()

    def done(self, *, wait: bool) -> bool:
        """Whether writing has ended; with `wait`, wait until it has. A process that stays stopped is killed."""
        if self._process is None:
            return True
        checks = 0
        while wait and self._process.exitcode is None:
            self._process.join(POLL_S)
            checks = checks + 1 if self._is_stopped() else 0
            if checks * POLL_S >= STOPPED_S:
                self._process.kill()
        return self._process.exitcode is not None

    def _is_stopped(self) -> bool:
        if self._process.exitcode is not None:
            return False
        return psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED

    def kill(self) -> None:
        """Kill the writing process; its files are incomplete."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _reason(error: BaseException) -> str:
    """The message of an error, or of the operating system's error that caused it, if any."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}" if cause is None else str(cause)
