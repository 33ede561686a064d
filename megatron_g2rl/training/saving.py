"""What a run leaves on disk of its weights: checkpoints to go on from, the best of them, and Hugging Face folders."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

import torch.distributed as dist

from megatron_g2rl.config import Config
from megatron_g2rl.evaluation.periodic import Best
from megatron_g2rl.policy.checkpoint.checkpoints import step_folder, step_of
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.rollout.journal import JournaledRollout

log = logging.getLogger(__name__)


class RunSaver:
    """Saves a run; every method is a collective."""

    def __init__(self, config: Config, folder: Path, policy: Policy, rollout: JournaledRollout, saved_step: int | None):
        """Save to `folder`.

        Args:
            config: of the run.
            folder: of the run.
            policy: what is saved.
            rollout: its journal is cut when a checkpoint makes it useless.
            saved_step: step of the checkpoint that the run went on from.
        """
        self.config, self.folder, self.policy, self.rollout = config, folder, policy, rollout
        self.saved_step, self.best = saved_step, None
        settings = config.checkpoint
        policy.open_checkpoints(folder / "checkpoints", keep=settings.keep, asynchronous=settings.asynchronous)

    def resume_best(self, best: Best | None) -> None:
        """Take up the best evaluation so far; best.json names its checkpoint, also if a kill came between the two."""
        self.best = best
        self._point_at_best()

    def save(self, step: int, state: dict, best: Best | None = None) -> None:
        """Begin to save a checkpoint, if this step has none; `finish` completes it.

        Args:
            step: steps finished.
            state: what the loop needs to go on (JSON).
            best: the best evaluation so far; its checkpoint is kept.
        """
        self.best = best
        self.finish(wait=self.saved_step != step)
        if self.saved_step == step:
            self._point_at_best()
            return
        self.policy.save_checkpoint(step, state, protect={best.step} if best else ())
        self.saved_step = step

    def finish(self, *, wait: bool = False) -> None:
        """Complete a save that is written in the background.

        Args:
            wait: until it is written; else only if it is.
        """
        saved = self.policy.checkpoints.finish(wait)
        if saved is None:
            return
        self._point_at_best()
        self.rollout.forget_before(step_of(saved))

    def _point_at_best(self) -> None:
        """Let best.json name the checkpoint of the best evaluation, once that is complete, and drop the one before."""
        path = self.folder / "checkpoints" / "best.json"
        if dist.get_rank() or self.best is None or not (path.parent / step_folder(self.best.step)).is_dir():
            return
        found = {"checkpoint": step_folder(self.best.step), self.config.checkpoint.best_metric: self.best.value}
        partial = path.with_name(".best.json")
        partial.write_text(json.dumps(found, indent=2) + "\n")
        os.replace(partial, path)
        self.policy.checkpoints.prune({self.best.step})

    def close(self) -> None:
        """Leave a save that is under way unfinished; no collective, for a rank that ends with an error."""
        self.policy.checkpoints.close()

    def export(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder, which is there whole or not at all."""
        start, partial = time.perf_counter(), folder.with_name(f".partial_{folder.name}")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            self.policy.save_hf(partial)
        except Exception:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # what has filled the disk must not stay there
            raise
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            log.info("wrote %s in %.1f s", folder, time.perf_counter() - start)
        dist.barrier()
