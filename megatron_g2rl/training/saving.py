"""Saves the weights of a run: checkpoints to resume from, a pointer to the best one, and Hugging Face exports."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path

import torch.distributed as dist

from megatron_g2rl.config import Config
from megatron_g2rl.distributed.collectives import on_first_rank
from megatron_g2rl.evaluation.periodic import Best
from megatron_g2rl.policy.checkpoint.checkpoints import step_folder, step_of
from megatron_g2rl.policy.checkpoint.save import Checkpoints
from megatron_g2rl.policy.critic import Critic
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.rollout.journal import JournaledRollout

log = logging.getLogger(__name__)


class RunSaver:
    """Saves a run; every method is a collective."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        policy: Policy,
        rollout: JournaledRollout,
        saved_step: int | None = None,
        best: Best | None = None,
        critic: Critic | None = None,
    ):
        """Save to `folder`, and rewrite best.json in case the run was killed before that.

        Args:
            config: the run's configuration.
            folder: the run folder.
            policy: the policy to save.
            rollout: its journal is pruned once a checkpoint supersedes the entries.
            saved_step: step of the checkpoint that the run resumed from.
            best: the best evaluation so far.
            critic: the critic to save with the policy; None: there is none.
        """
        self.config = config
        self.folder = folder
        self.policy = policy
        self.rollout = rollout
        self.saved_step = saved_step
        self.best = best
        settings = config.checkpoint
        self.checkpoints = Checkpoints(
            policy, folder / "checkpoints", keep=settings.keep, asynchronous=settings.asynchronous, critic=critic
        )
        self._point_at_best()

    def save(self, step: int, state: dict, best: Best | None = None) -> None:
        """Start saving a checkpoint unless this step has one; `finish` completes it.

        Args:
            step: completed steps.
            state: state of the training loop, needed to resume (JSON).
            best: the best evaluation so far; its checkpoint is kept.
        """
        self.best = best
        self.finish(wait=self.saved_step != step)
        if self.saved_step == step:
            self._point_at_best()
            return
        self.checkpoints.save(step, state, protect={best.step} if best else ())
        self.saved_step = step

    def finish(self, *, wait: bool = False) -> None:
        """Complete a checkpoint that is being written in the background.

        Args:
            wait: block until it is written; otherwise complete it only if it already is.
        """
        saved = self.checkpoints.finish(wait)
        if saved is None:
            return
        self._point_at_best()
        self.rollout.forget_before(step_of(saved))

    def _point_at_best(self) -> None:
        """Point best.json to the best evaluation's checkpoint, once complete, and drop the previous best one."""
        if self.best is not None:
            on_first_rank(self._write_best)

    def _write_best(self) -> None:
        path = self.folder / "checkpoints" / "best.json"
        if not (path.parent / step_folder(self.best.step)).is_dir():
            return
        content = {"checkpoint": step_folder(self.best.step), self.config.checkpoint.best_metric: self.best.value}
        partial = path.with_name(".best.json")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, path)
        self.checkpoints.prune({self.best.step})

    def close(self) -> None:
        """Abandon a running save; not a collective, so that a rank that ends with an error can call it."""
        self.checkpoints.close()

    def export(self, folder: Path) -> None:
        """Write the weights as a Hugging Face folder; the write is atomic."""
        start, partial = time.perf_counter(), folder.with_name(f".partial_{folder.name}")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            self.policy.save_hf(partial)
        except Exception:
            if dist.get_rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)  # it may be what filled the disk
            raise

        def publish() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            log.info("wrote %s in %.1f s", folder, time.perf_counter() - start)

        on_first_rank(publish)
