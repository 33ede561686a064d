"""Everything that rank 0 writes about the steps of a run."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from megatron_g2rl.config import Config
from megatron_g2rl.experience import Experience
from megatron_g2rl.tracking.responses import response_rows
from megatron_g2rl.tracking.table import unknown_names
from megatron_g2rl.tracking.writers import StepLines, TensorBoardWriter, WandbWriter

log = logging.getLogger(__name__)


class Tracker:
    """metrics.jsonl and responses.jsonl of a run; TensorBoard and Weights & Biases where `logging` asks for them."""

    def __init__(self, folder: Path, config: Config, first_step: int):
        """Open for a run that goes on at `first_step`.

        Args:
            folder: folder of the run.
            config: of the run.
            first_step: what was written of that step and later is taken back.

        Raises:
            ConfigError: Weights & Biases is asked for and not installed.
        """
        settings = config.logging
        self.metrics = StepLines(folder / "metrics.jsonl", first_step)
        self.responses = StepLines(folder / "responses.jsonl", first_step)
        self.tensorboard = self.evaluations = None
        if settings.tensorboard:
            self.tensorboard = TensorBoardWriter(folder / "tensorboard", first_step)
        if settings.tensorboard and config.evaluation:
            # A folder of its own: the evaluation of the checkpoint's weights is not made again, so it must stay.
            self.evaluations = TensorBoardWriter(folder / "tensorboard" / "evaluation", first_step + 1)
        self.wandb = WandbWriter(folder, config) if settings.wandb_project else None
        self._every = settings.responses_every_steps
        self._warned: set[str] = set()

    def write(self, step: int, metrics: dict[str, float], experience: Experience) -> None:
        """Write the numbers of a step and, in every `logging.responses_every_steps`-th, a few of its responses.

        A name that the table lacks is written all the same: a warning is better than a run lost to it.
        """
        self._warn_of_unknown(metrics)
        rows = response_rows(experience) if self._every and step % self._every == 0 else []
        self.metrics.write(step, metrics)
        self.responses.write(step, *rows)
        if self.tensorboard:
            self.tensorboard.write(step, metrics, rows)
        if self.wandb:
            self.wandb.write(step, metrics)

    def write_evaluation(self, steps_done: int, metrics: dict[str, float]) -> None:
        """Send the numbers of an evaluation after so many steps to TensorBoard and Weights & Biases."""
        self._warn_of_unknown(metrics)
        if self.evaluations:
            self.evaluations.write(steps_done, metrics, [])
        if self.wandb:
            self.wandb.write(steps_done, metrics)

    def _warn_of_unknown(self, metrics: dict[str, float]) -> None:
        unknown = [name for name in unknown_names(metrics) if name not in self._warned]
        if unknown:
            self._warned.update(unknown)
            log.warning("metrics not in the table of megatron_g2rl/tracking/table.py: %s", ", ".join(unknown))

    def close(self) -> None:
        """Write what is left."""
        with ExitStack() as closing:
            for writer in (self.tensorboard, self.evaluations, self.wandb):
                if writer:
                    closing.callback(writer.close)
