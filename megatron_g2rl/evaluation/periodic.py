"""Evaluations of a training run: when they are due, and evaluation.jsonl, where they stand."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_g2rl.config import Config
from megatron_g2rl.config.renamed import current_metric
from megatron_g2rl.evaluation.evaluate import Evaluator, load_held_out
from megatron_g2rl.rewards.distribute import DistributedRewards
from megatron_g2rl.rollout.endings import Endings
from megatron_g2rl.rollout.engine import RolloutEngine, Stop
from megatron_g2rl.tracking.writers import StepLines, step_of_line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far."""

    step: int
    """Training steps behind its weights."""
    value: float
    """Its `checkpoint.best_metric`."""


class PeriodicEvaluation:
    """Evaluates before the first step, every `evaluation.every_steps` steps and after the last; each time once.

    A line of evaluation.jsonl has in `step` how many training steps are behind the weights: 0 is the model as it came.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        columns: Collection[str] = (),
        needed: Collection[str] = (),
    ):
        """Load the held-out prompts of `config.evaluation`, which must be set; as `load_held_out`, errors too."""
        self.config = config
        self.evaluator = Evaluator(config, load_held_out(config, tokenizer, columns, needed))
        self.file: StepLines | None = None
        self.done_after: int | None = None
        self.best: Best | None = None
        """The evaluation with the best `checkpoint.best_metric`, the first of several; None without one."""

    def open(self, path: Path, steps_done: int) -> None:
        """Write to `path` from here on, in a run that has `steps_done` steps behind it; a collective.

        Lines of later steps, from before a kill, are removed.
        """
        found: list = [None, None]
        if dist.get_rank() == 0:
            self.file = StepLines(path, steps_done + 1)
            for line in path.read_bytes().splitlines() if path.is_file() else ():
                if (row := step_of_line(line)) is not None:
                    self._compare(**{current_metric(name): value for name, value in row.items()})
            found = [self.file.last_step, self.best]
        dist.broadcast_object_list(found, src=0)
        self.done_after, self.best = found

    def due(self, steps_done: int) -> bool:
        """Whether an evaluation belongs after so many steps and has not been made."""
        on_time = steps_done % self.config.evaluation.every_steps == 0 or steps_done == self.config.trainer.steps
        return on_time and self.done_after != steps_done

    def run(
        self,
        rollout: RolloutEngine,
        rewards: DistributedRewards,
        steps_done: int,
        endings: Endings,
        stop: Stop | None = None,
    ) -> dict[str, float]:
        """Evaluate, write the line, return its numbers; a collective. The sampler is awake with the current weights.

        Raises:
            RolloutStopped: `stop` said so; no line was written, and the evaluation stays due.
        """
        start = time.perf_counter()
        metrics = self.evaluator.evaluate(rollout, rewards, steps_done, endings, stop)
        self.done_after = steps_done
        self._compare(steps_done, **metrics)
        metrics["time/evaluation_s"] = time.perf_counter() - start
        if self.file:
            self.file.write(steps_done, metrics)
            log.info(evaluation_line(steps_done, metrics))
        return metrics

    def _compare(self, step: int, **metrics: float | None) -> None:
        """Make an evaluation the best so far if it is."""
        name = self.config.checkpoint.best_metric
        if name is None:
            return
        if name.endswith("_n"):
            name = f"{name[:-1]}{self.config.evaluation.responses_per_prompt}"
        value = metrics.get(f"evaluation/{name}")
        if type(value) in (int, float) and (self.best is None or value > self.best.value):
            self.best = Best(step, value)


def evaluation_line(steps_done: int, metrics: dict[str, float]) -> str:
    """One line for a person."""
    shares = [
        f"{name.removeprefix('evaluation/').replace('_at_', '@')} {value:.1%}"
        for name, value in metrics.items()
        if "_at_" in name
    ]
    tokens = f"tokens {metrics['evaluation/response_length_mean']:.0f}"
    return " | ".join([f"held out, after {steps_done} steps", *shares, tokens])
