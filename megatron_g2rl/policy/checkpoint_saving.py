"""Saves a run's checkpoints, while training goes on if wanted."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata

from megatron_g2rl.errors import Interrupted
from megatron_g2rl.policy import manifest
from megatron_g2rl.policy.checkpoint import (
    MEGATRON,
    STATE,
    CheckpointError,
    complete,
    on_first_rank,
    step_folder,
    step_of,
)
from megatron_g2rl.policy.checkpoint_state import sharded_state
from megatron_g2rl.policy.checkpoint_worker import Mailbox, Part
from megatron_g2rl.policy.hf.side_files import copy_side_files
from megatron_g2rl.policy.optimizer import Optimizer

log = logging.getLogger(__name__)
_PARTIAL, _REMOVED = ".partial_", ".removed_"


class CheckpointNotWritten(CheckpointError, Interrupted):
    """A save failed; the checkpoints before it are as they were."""


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed run left unfinished in `folder`, if that is there; the caller holds the run's lock."""
    for path in folder.glob(".*"):
        if path.name.startswith((_PARTIAL, _REMOVED)):
            shutil.rmtree(path, ignore_errors=True)


@dataclass
class _Save:
    """A save that is not finished."""

    step: int
    partial: Path
    protect: frozenset[int]
    started: float
    mailbox: Mailbox
    writer: filesystem_async.FileSystemWriterAsync | None = None
    metadata: Metadata | None = None


class _Planned(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where this rank's buckets are known; writing and finishing is ours."""

    def _get_save_and_finalize_callbacks(self, writer, save_state_dict_ret):
        _, self.metadata, _ = save_state_dict_ret
        self.writer = writer
        return AsyncRequest(None, (), [])


class Checkpoints:
    """The checkpoints of a run; every method but `close` and `prune` is a collective over all ranks.

    With `asynchronous`, `save` returns when the state is copied to host memory and a process is forked that writes and
    checksums it; `finish` gives the checkpoint its name. On a GPU this takes host memory for a copy of the state; on a
    CPU the copy is made as training changes the weights (copy on write), and writing competes with it for the cores.
    It needs os.fork, and therefore Linux. At most one save is under way: the next one waits for it.
    """

    def __init__(self, folder: Path, side_files: Path, *, keep: int, asynchronous: bool):
        """Make the folder and remove what killed runs left in it; the caller holds the run's lock.

        Args:
            folder: the run's checkpoint folder.
            side_files: Hugging Face or Megatron folder whose configuration and tokenizer go into each checkpoint.
            keep: how many of the latest checkpoints stay.
            asynchronous: write in the background.

        Raises:
            CheckpointError: the folder cannot be made.
        """
        self.folder, self.side_files, self.keep, self.asynchronous = folder, side_files, keep, asynchronous
        self.seconds_blocking = 0.0
        """How long the last save kept training waiting."""
        self.seconds_total = 0.0
        """From the beginning of the last finished save to its rename."""
        self._queue = AsyncCallsQueue()
        self._save: _Save | None = None
        self._finished: Path | None = None
        on_first_rank(self._prepare, f"checkpoints cannot be written to {folder}")

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)

    def save(self, step: int, optimizer: Optimizer, trainer_state: dict, protect: Collection[int] = ()) -> None:
        """Write a checkpoint, or begin to; `finish` tells when it is complete.

        Args:
            step: steps finished.
            optimizer: holds the model chunks too; may change as soon as this returns.
            trainer_state: JSON-serialisable state of the loop, the same on every rank.
            protect: steps whose checkpoints stay beside the latest ones.

        Raises:
            CheckpointError: a file cannot be written, of this save or of the one before it; older checkpoints are as
                they were.
        """
        if self._save:
            self._finish(wait=True)
        started = time.monotonic()
        partial = on_first_rank(lambda: self._make_partial(step), f"the checkpoint of step {step} cannot be written")
        sharded, common = save_preprocess(sharded_state(optimizer, loading=False))
        planned = _Planned("torch_dist", 1)
        # Replicas share the writing.
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        save = _Save(step, partial, frozenset(protect), started, Mailbox())
        filesystem_async._results_queue = save.mailbox  # else it starts a manager process that nobody ends
        FullyParallelSaveStrategyWrapper(planned, group).async_save(sharded, str(partial / MEGATRON))
        save.writer, save.metadata = planned.writer, planned.metadata

        text = json.dumps(trainer_state, indent=2)

        def small_files() -> None:
            torch.save(common, partial / MEGATRON / "common.pt")
            save_config(CheckpointingConfig("torch_dist", 1), str(partial / MEGATRON))
            (partial / STATE).write_text(text)
            copy_side_files(self.side_files, partial)

        part = Part(partial, small_files if dist.get_rank() == 0 else None, [planned.writer.transforms], os.getpid())
        buckets = planned.writer.write_buckets or []
        request = AsyncRequest(
            part.write,
            (dist.get_rank(), buckets, save.mailbox),
            [self._complete],
            preload_fn=lambda: planned.writer.preload_tensors(buckets, True),
        )
        self._save = save
        if self.asynchronous:
            self._queue.schedule_async_request(request)
            # The forked process has them; here they would keep a copy of the state on the device.
            buckets.clear()
        else:
            request.execute_sync()
        self.seconds_blocking = time.monotonic() - started

    def finish(self, wait: bool) -> Path | None:
        """Give a save that is written its name; with `wait`, wait until it is.

        Returns:
            The checkpoint that has become complete since the last call, or None.

        Raises:
            CheckpointError: it could not be written; older checkpoints are as they were.
        """
        if self._save:
            self._finish(wait)
        finished, self._finished = self._finished, None
        return finished

    def close(self) -> None:
        """End a save that is under way without completing it; no collective, for a rank that stops on an error.

        An orderly end calls `finish(wait=True)` before. What was written is removed, at the latest at the next start.
        """
        while self._queue.async_calls:
            caller = self._queue.async_calls.popleft().async_caller
            if caller.process:
                caller.process.kill()
                caller.process.join()
        if self._save and dist.get_rank() == 0:
            # A run that ends because the disk is full must not be what fills it.
            shutil.rmtree(self._save.partial, ignore_errors=True)
        self._save = None

    def _finish(self, wait: bool) -> None:
        started = time.monotonic()
        self._queue.maybe_finalize_async_calls(blocking=wait)
        self.seconds_blocking += time.monotonic() - started

    def _make_partial(self, step: int) -> Path:
        # A name of its own: what a killed run's processes may still write lands elsewhere.
        partial = self.folder / f"{_PARTIAL}{step_folder(step)}_{secrets.token_hex(4)}"
        (partial / MEGATRON).mkdir(parents=True)
        return partial

    def _complete(self) -> None:
        """When every rank has written its part: the index, the manifest, the rename; a collective."""
        save, self._save = self._save, None
        outcome = save.mailbox.get()
        outcomes = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(outcome, outcomes, dst=0)

        def publish() -> Path:
            try:
                return self._publish(save, outcomes)
            except Exception as error:
                shutil.rmtree(save.partial, ignore_errors=True)
                raise CheckpointNotWritten(
                    f"the checkpoint of step {save.step} cannot be written to {self.folder} ({error}): free disk space "
                    "there"
                ) from error

        self._finished = on_first_rank(publish, "")
        self.seconds_total = time.monotonic() - save.started
        seconds = self.seconds_blocking, self.seconds_total
        log.info("saved %s: training waited for %.1f s of %.1f", self._finished, *seconds)

    def _publish(self, save: _Save, outcomes: list) -> Path:
        failed = [f"rank {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
        if failed:
            raise OSError("; ".join(failed[:3]))
        # Every rank's plan, which megatron keeps for a cache that is not used here.
        vars(save.metadata).pop("all_local_plans", None)
        save.writer.finish(save.metadata, [outcome.results for outcome in outcomes])
        files = {name: entry for outcome in outcomes for name, entry in outcome.files.items()}
        manifest.write(save.partial, files | manifest.checksums(save.partial, [f"{MEGATRON}/.metadata"]))
        for folder in (save.partial / MEGATRON, save.partial):
            _sync(folder)
        final = self.folder / step_folder(save.step)
        self._remove(final)
        os.replace(save.partial, final)
        _sync(self.folder)
        self.prune(save.protect)
        return final

    def prune(self, protect: Collection[int]) -> None:
        """Remove all but the latest `keep` checkpoints and those of the steps `protect`; on rank 0, no collective."""
        for old in complete(self.folder)[: -self.keep]:
            if step_of(old) not in protect:
                self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        """Under another name first: a reader never sees half a checkpoint."""
        if checkpoint.exists():
            aside = checkpoint.with_name(f"{_REMOVED}{checkpoint.name}_{secrets.token_hex(4)}")
            checkpoint.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
