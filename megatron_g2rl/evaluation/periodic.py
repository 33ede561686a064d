"""Periodic evaluations of a training run: when they are due, and writing their metrics to evaluation.jsonl."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_g2rl.config import Config
from megatron_g2rl.config.renamed import current_metric
from megatron_g2rl.distributed.collectives import on_first_rank
from megatron_g2rl.evaluation.evaluate import Evaluator
from megatron_g2rl.rollout.endings import Endings
from megatron_g2rl.rollout.engine import RolloutEngine, Stop
from megatron_g2rl.tracking.writers import StepLines, step_of_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far."""

    step: int
    """Training steps of its weights."""
    value: float
    """Value of its `checkpoint.best_metric`."""


class PeriodicEvaluation:
    """Evaluates before the first step, every `evaluation.every_steps` steps and after the last step, once each.

    `step` in a line of evaluation.jsonl is the number of training steps of the weights: 0 is the initial model.
    """

    def __init__(self, config: Config, evaluators: Sequence[Evaluator], path: Path, steps_done: int):
        """Continue the evaluations of a run; a collective.

        Args:
            config: the run's configuration; `evaluation` must be set.
            evaluators: one for each evaluation set; the first one decides which checkpoint is the best.
            path: file of the results; lines of later steps, written before a kill, are removed.
            steps_done: completed steps of the run.

        Raises:
            OSError: the file cannot be opened; on every rank.
        """
        self.config = config
        self.evaluators = evaluators
        self.file: StepLines | None = None
        """The file of the results, on rank 0."""
        self.best: Best | None = None
        """The evaluation with the best `checkpoint.best_metric`, the earliest on ties; None if there is none."""
        self.done_after, self.best = on_first_rank(lambda: self._open(path, steps_done))

    def _open(self, path: Path, steps_done: int) -> tuple[int | None, Best | None]:
        """Open the file; returns the step of the last evaluation in it, and the best one."""
        self.file = StepLines(path, steps_done + 1)
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            if (row := step_of_line(line)) is not None:
                self._compare(**{current_metric(name): value for name, value in row.items()})
        return self.file.last_step, self.best

    def due(self, steps_done: int) -> bool:
        """Whether an evaluation is scheduled after `steps_done` steps and has not run yet."""
        on_time = steps_done % self.config.evaluation.every_steps == 0 or steps_done == self.config.trainer.steps
        return on_time and self.done_after != steps_done

    def run(
        self, rollout: RolloutEngine, steps_done: int, endings: Endings, stop: Stop | None = None
    ) -> dict[str, float]:
        """Evaluate every set, write a line, return its metrics; a collective. Arguments are as in `Evaluator.evaluate`.

        Raises:
            RolloutStopped: `stop` returned True; no line was written, and the evaluation stays due.
        """
        start = time.perf_counter()
        metrics: dict[str, float] = {}
        for evaluator in self.evaluators:
            metrics |= evaluator.metrics(evaluator.evaluate(rollout, steps_done, endings, stop))
        self.done_after = steps_done
        self._compare(steps_done, **metrics)
        metrics["time/evaluation_s"] = time.perf_counter() - start
        if self.file:
            self.file.write(steps_done, metrics)
            for evaluator in self.evaluators:
                log.info(evaluation_line(steps_done, metrics, evaluator))
        return metrics

    def _compare(self, step: int, **metrics: float | None) -> None:
        """Update `best` if this evaluation is better."""
        name = self.config.checkpoint.best_metric
        if name is None:
            return
        first = self.evaluators[0]
        if name.endswith("_n"):
            name = f"{name[:-1]}{first.benchmark.samples}"
        value = metrics.get(first.prefix + name)
        if type(value) in (int, float) and (self.best is None or value > self.best.value):
            self.best = Best(step, value)


def evaluation_line(steps_done: int, metrics: dict[str, float], evaluator: Evaluator) -> str:
    """Format the metrics of one evaluation set as one log line."""
    names = [metric.replace("@", "_at_") for metric in evaluator.benchmark.metrics]
    accuracies = [f"{name.replace('_at_', '@')} {metrics[evaluator.prefix + name]:.1%}" for name in names]
    tokens = f"tokens {metrics[f'{evaluator.prefix}response_length_mean']:.0f}"
    label = f"evaluation on {evaluator.name}" if evaluator.name else "evaluation"
    return " | ".join([f"{label} after {steps_done} steps", *accuracies, tokens])
