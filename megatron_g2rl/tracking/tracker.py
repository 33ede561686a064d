"""All per-step output of rank 0."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from megatron_g2rl.config import Config
from megatron_g2rl.records import Experience
from megatron_g2rl.tracking.responses import response_rows
from megatron_g2rl.tracking.table import unknown_names
from megatron_g2rl.tracking.writers import StepLines, TensorBoardWriter, WandbWriter

log = logging.getLogger(__name__)


class Tracker:
    """metrics.jsonl and responses.jsonl of a run; TensorBoard and Weights & Biases if enabled in `logging`."""

    def __init__(self, folder: Path, config: Config, first_step: int):
        """Open for a run that starts or resumes at `first_step`.

        Args:
            folder: folder of the run.
            config: configuration of the run.
            first_step: entries of this step and later are discarded.

        Raises:
            ConfigError: Weights & Biases is enabled but not installed.
        """
        settings = config.logging
        self.metrics = StepLines(folder / "metrics.jsonl", first_step)
        self.responses = StepLines(folder / "responses.jsonl", first_step)
        self.tensorboard = self.evaluations = None
        if settings.tensorboard:
            self.tensorboard = TensorBoardWriter(folder / "tensorboard", first_step)
        if settings.tensorboard and config.evaluation:
            # Its own folder: the evaluation of the checkpoint's weights is not repeated on resume, so it must be kept.
            self.evaluations = TensorBoardWriter(folder / "tensorboard" / "evaluation", first_step + 1)
        self.wandb = WandbWriter(folder, config) if settings.wandb_project else None
        self._every = settings.responses_every_steps
        self._warned: set[str] = set()

    def write(self, step: int, metrics: dict[str, float], experience: Experience) -> None:
        """Write the metrics of a step and, every `logging.responses_every_steps` steps, a few of its responses.

        A metric that is missing from the table is still written, with a warning, rather than failing the run.
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
        """Send the metrics of the evaluation after `steps_done` steps to TensorBoard and Weights & Biases."""
        self._warn_of_unknown(metrics)
        if self.evaluations:
            self.evaluations.write(steps_done, metrics, [])
        if self.wandb:
            self.wandb.write(steps_done, metrics)

    def _warn_of_unknown(self, metrics: dict[str, float]) -> None:
        unknown = [name for name in unknown_names(metrics) if name not in self._warned]
        if unknown:
            self._warned.update(unknown)
            log.warning("metrics missing from the table in megatron_g2rl/tracking/table.py: %s", ", ".join(unknown))

    def close(self) -> None:
        """Flush and close all writers."""
        with ExitStack() as closing:
            for writer in (self.tensorboard, self.evaluations, self.wandb):
                if writer:
                    closing.callback(writer.close)
