"""Saves a run's checkpoints, optionally while training continues."""

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
from torch.distributed.checkpoint.metadata import Metadata

from megatron_g2rl.config.run_files import MEGATRON, TRAINER_STATE
from megatron_g2rl.distributed.collectives import gather_on_first_rank, on_first_rank
from megatron_g2rl.errors import Interrupted
from megatron_g2rl.policy.checkpoint import manifest
from megatron_g2rl.policy.checkpoint.checkpoints import (
    CheckpointError,
    complete,
    step_folder,
    step_of,
)
from megatron_g2rl.policy.checkpoint.model_files import copy_model_files
from megatron_g2rl.policy.checkpoint.plan import Planner, TorchDistWriter
from megatron_g2rl.policy.checkpoint.state import saved_state
from megatron_g2rl.policy.checkpoint.writer import BackgroundWrite, ShardWriter
from megatron_g2rl.policy.critic import Critic
from megatron_g2rl.policy.hf.megatron_folder import write_format
from megatron_g2rl.policy.policy import Policy

log = logging.getLogger(__name__)
_PARTIAL, _REMOVED = ".partial_", ".removed_"


class CheckpointNotWritten(CheckpointError, Interrupted):
    """A save failed; earlier checkpoints are unchanged."""


def remove_unfinished(folder: Path) -> None:
    """Remove incomplete checkpoints of a killed run from `folder`, if any; the caller holds the run's lock."""
    for path in folder.glob(".*"):
        if path.name.startswith((_PARTIAL, _REMOVED)):
            shutil.rmtree(path, ignore_errors=True)


@dataclass
class _Save:
    """A save in progress."""

    step: int
    partial: Path
    protect: frozenset[int]
    started: float
    writer: TorchDistWriter
    metadata: Metadata | None
    """The index, on rank 0."""
    background: BackgroundWrite


class Checkpoints:
    """The checkpoints of a run; every method except `close` and `prune` is a collective over all ranks.

    With `asynchronous`, `save` returns once the state is copied to host memory and a process is forked that writes and
    checksums it; `finish` gives the checkpoint its final name. On a GPU this uses host memory for a copy of the state;
    on a CPU pages are copied as training changes the weights (copy on write), and writing competes with training for
    the cores. It needs os.fork, and therefore Linux. At most one save is in progress: the next one waits for it.
    """

    def __init__(self, policy: Policy, folder: Path, *, keep: int, asynchronous: bool, critic: Critic | None = None):
        """Create the folder and remove incomplete checkpoints of killed runs; the caller holds the run's lock.

        Args:
            policy: the policy to save; the config and tokenizer files of its model go into each checkpoint.
            folder: the run's checkpoint folder.
            keep: number of latest checkpoints to keep.
            asynchronous: write in the background.
            critic: its weights and optimizer are saved with those of the policy; None: there is none.

        Raises:
            CheckpointError: the folder cannot be created.
        """
        self.policy = policy
        self.critic = critic
        self.folder = folder
        self.keep = keep
        self.asynchronous = asynchronous
        self.seconds_blocking = 0.0
        """Seconds that training waited for the last save."""
        self.seconds_total = 0.0
        """Seconds from the start of the last completed save to its rename."""
        self._planner = Planner()
        self._save: _Save | None = None
        self._finished: Path | None = None
        on_first_rank(self._prepare, f"checkpoints cannot be written to {folder}", CheckpointError)

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)

    def save(self, step: int, trainer_state: dict, protect: Collection[int] = ()) -> None:
        """Write a checkpoint of the policy and its critic, or start writing it; `finish` reports when it is complete.

        They may change as soon as this returns.

        Args:
            step: number of completed steps.
            trainer_state: JSON-serializable state of the training loop, the same on every rank.
            protect: steps whose checkpoints are kept in addition to the latest ones.

        Raises:
            CheckpointError: a file of this save or of the previous one cannot be written; older checkpoints are
                unchanged.
        """
        if self._save:
            self._finish(wait=True)
        started = time.monotonic()
        for model in filter(None, (self.policy, self.critic)):
            model.gather_parameters()
            model.optimizer.wake()
        when = f"the checkpoint of step {step} cannot be written"
        partial = on_first_rank(lambda: self._make_partial(step), when, CheckpointError)
        writer = TorchDistWriter(partial / MEGATRON)
        state = saved_state(self.policy.optimizer)
        if self.critic is not None:
            state = state.with_critic(saved_state(self.critic.optimizer))
        plan, metadata = self._planner.plan(state.blocks, list(state.objects), writer)
        tensors = state.tensors_of(plan)
        signature = self.policy.architecture.signature()
        text = json.dumps({"architecture": signature, "trainer": trainer_state}, indent=2)

        def small_files() -> None:
            torch.save(state.common, partial / MEGATRON / "common.pt")
            write_format(partial / MEGATRON)
            (partial / TRAINER_STATE).write_text(text)
            copy_model_files(self.policy.model_path, partial)

        shard = ShardWriter(
            partial, small_files if dist.get_rank() == 0 else None, writer, plan, tensors, state.objects
        )
        background = BackgroundWrite(shard, asynchronous=self.asynchronous)
        self._save = _Save(step, partial, frozenset(protect), started, writer, metadata, background)
        if not self.asynchronous:
            self._complete()
        self.seconds_blocking = time.monotonic() - started

    def finish(self, wait: bool) -> Path | None:
        """Give a fully written save its final name; with `wait`, wait until it is written.

        Returns:
            The checkpoint that was completed since the last call, or None.

        Raises:
            CheckpointError: it could not be written; older checkpoints are unchanged.
        """
        if self._save:
            self._finish(wait)
        finished, self._finished = self._finished, None
        return finished

    def close(self) -> None:
        """Abort a save in progress; not a collective, for a rank that stops on an error.

        A normal end calls `finish(wait=True)` first. Partial files are removed here or at the next start.
        """
        if self._save:
            self._save.background.kill()
        if self._save and dist.get_rank() == 0:
            # A run that ends because the disk is full must not leave partial files that fill it.
            shutil.rmtree(self._save.partial, ignore_errors=True)
        self._save = None

    def _finish(self, wait: bool) -> None:
        started = time.monotonic()
        done = torch.tensor(int(self._save.background.done(wait=wait)))
        if not wait:
            dist.all_reduce(done, dist.ReduceOp.MIN)
        if done:
            self._complete()
        self.seconds_blocking += time.monotonic() - started

    def _make_partial(self, step: int) -> Path:
        # A unique name, so that processes of a killed run that are still writing use another folder.
        partial = self.folder / f"{_PARTIAL}{step_folder(step)}_{secrets.token_hex(4)}"
        for folder in (self.folder, partial, partial / MEGATRON):  # no parents: do not recreate a removed run folder
            folder.mkdir(exist_ok=True)
        return partial

    def _complete(self) -> None:
        """After every rank has written its part: write the index and the manifest, and rename; a collective."""
        save, self._save = self._save, None
        outcomes = gather_on_first_rank(save.background.result.get())

        def publish() -> Path:
            try:
                return self._publish(save, outcomes)
            except Exception as error:
                shutil.rmtree(save.partial, ignore_errors=True)
                raise CheckpointNotWritten(
                    f"the checkpoint of step {save.step} cannot be written to {self.folder} ({error}): free disk space "
                    "there"
                ) from error

        self._finished = on_first_rank(publish)
        self.seconds_total = time.monotonic() - save.started
        seconds = self.seconds_blocking, self.seconds_total
        log.info("saved %s: training waited for %.1f s of %.1f s", self._finished, *seconds)

    def _publish(self, save: _Save, outcomes: list) -> Path:
        failed = [f"rank {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
        if failed:
            raise OSError("; ".join(failed[:3]))
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
        """Remove all but the latest `keep` checkpoints and those of the steps `protect`; rank 0 only."""
        for old in complete(self.folder)[: -self.keep]:
            if step_of(old) not in protect:
                self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        """Remove a checkpoint after renaming it, so that a reader never sees a partial checkpoint."""
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
