"""Evaluations of a training run: when they are due, and evaluation.jsonl, where they stand."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_g2rl.config import Config
from megatron_g2rl.evaluation.evaluate import Evaluator, load_held_out
from megatron_g2rl.rewards.distribute import DistributedRewards
from megatron_g2rl.rollout.engine import RolloutEngine
from megatron_g2rl.tracking.writers import StepLines

log = logging.getLogger(__name__)


class PeriodicEvaluation:
    """Evaluates before the first step, every `evaluation.every_steps` steps and after the last; each time once.

    A line of evaluation.jsonl has in `step` how many training steps are behind the weights: 0 is the model as it came.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase):
        """Load the held-out prompts of `config.evaluation`, which must be set; errors are those of `load_held_out`."""
        self.config = config
        self.evaluator = Evaluator(config, load_held_out(config, tokenizer))
        self.file: StepLines | None = None
        self.done_after: int | None = None

    def open(self, path: Path, steps_done: int) -> None:
        """Write to `path` from here on, in a run that has `steps_done` steps behind it; a collective.

        Lines of later steps, from before a kill, are removed.
        """
        last: list[int | None] = [None]
        if dist.get_rank() == 0:
            self.file = StepLines(path, steps_done + 1)
            last = [self.file.last_step]
        dist.broadcast_object_list(last, src=0)
        self.done_after = last[0]

    def due(self, steps_done: int) -> bool:
        """Whether an evaluation belongs after so many steps and has not been made."""
        on_time = steps_done % self.config.evaluation.every_steps == 0 or steps_done == self.config.trainer.steps
        return on_time and self.done_after != steps_done

    def run(self, rollout: RolloutEngine, rewards: DistributedRewards, steps_done: int) -> dict[str, float]:
        """Evaluate, write the line, return its numbers; a collective. The sampler is awake with the current weights."""
        start = time.perf_counter()
        metrics = self.evaluator.evaluate(rollout, rewards, steps_done)
        self.done_after = steps_done
        metrics["time/evaluation_s"] = time.perf_counter() - start
        if self.file:
            self.file.write(steps_done, metrics)
            log.info(evaluation_line(steps_done, metrics))
        return metrics


def evaluation_line(steps_done: int, metrics: dict[str, float]) -> str:
    """One line for a person."""
    shares = [
        f"{name.removeprefix('evaluation/').replace('_at_', '@')} {value:.1%}"
        for name, value in metrics.items()
        if "_at_" in name
    ]
    tokens = f"tokens {metrics['evaluation/tokens_mean']:.0f}"
    return " | ".join([f"held out, after {steps_done} steps", *shares, tokens])
