"""Writes a rank's part of a checkpoint and computes its checksums, in this process or in one forked from it.

The forked process sees memory as it was at the fork (copy on write), so training may continue meanwhile. It dies with
the rank, whatever kills that, and it leaves signals to it. Its outcome comes back through an anonymous file in memory
that only the two of them hold: no helper process could be left behind.
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
"""Seconds after which a process that is stopped (SIGSTOP) is given up: every rank would wait for it."""
LOOK_S = 2.0


@dataclass
class Outcome:
    """What became of a rank's part."""

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
        """Leave the outcome; once, before the process ends."""
        pickle.dump(outcome, self._file)
        self._file.flush()

    def get(self) -> Outcome:
        """The outcome; an error in it when the process ended without leaving one."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            return Outcome(error="the process that wrote it was killed, or stopped for long: was there enough memory?")
        finally:
            self._file.close()


class _Data(DefaultSavePlanner):
    """Gives torch's writer the data of each item."""

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
    """What one rank writes."""

    folder: Path
    """The checkpoint, still under its temporary name."""
    extra: Callable[[], None] | None
    """Writes the small files, on the first rank, before the tensors."""
    writer: TorchDistWriter
    plan: SavePlan
    tensors: Mapping[Any, Tensor]
    """By index of the plan's items; in host memory."""
    objects: Mapping[str, Any]

    def write(self, parent: int, result: ResultFile) -> None:
        """Write the files and their checksums, and leave the `Outcome`; never raises.

        Args:
            parent: process id of the rank.
            result: where the outcome goes.
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
    """In the forked process: end with the rank, leave signals to it, start no threads."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal_when_parent_ends(parent, signal.SIGKILL)
    # A parallel region would wait forever for the threads that fork did not copy.
    torch.set_num_threads(1)


class BackgroundWrite:
    """A `ShardWriter` at work: in this process until it is done, or in a forked one."""

    def __init__(self, writer: ShardWriter, *, asynchronous: bool):
        """Write, or begin to.

        Args:
            writer: what to write.
            asynchronous: in a forked process.
        """
        self.result = ResultFile()
        self._process: multiprocessing.Process | None = None
        if not asynchronous:
            writer.write(os.getpid(), self.result)
            return
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=writer.write, args=(os.getpid(), self.result))
        # The forked process must not finalize what belongs to this one, such as tensors on a GPU.
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._process.start()
        finally:
            if collecting:
                gc.enable()

    def done(self, *, wait: bool) -> bool:
        """Whether it has ended; with `wait`, wait until it has. One that stays stopped is killed."""
        if self._process is None:
            return True
        looks = 0
        while wait and self._process.exitcode is None:
            self._process.join(LOOK_S)
            looks = looks + 1 if self._is_stopped() else 0
            if looks * LOOK_S >= STOPPED_S:
                self._process.kill()
        return self._process.exitcode is not None

    def _is_stopped(self) -> bool:
        if self._process.exitcode is not None:
            return False
        return psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED

    def kill(self) -> None:
        """End it; what was written is incomplete."""
        if self._process is not None:
            self._process.kill()
            self._process.join()


def _reason(error: BaseException) -> str:
    """The message of an error; the operating system's where torch reports only what followed from it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}" if cause is None else str(cause)
