"""The run: its name, the training loop, checkpoints and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_g2rl.config.sections.base import Duration, FilePath, NonNegative, Positive, Section, comma_separated


class RunConfig(Section):
    """Name and output directory of the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")] = "run"
    """Name of the run; its files are written to `directory`/`name`."""
    directory: FilePath = Path("runs")
    """Parent folder of all runs."""
    seed: NonNegative = 0
    """Seed of data order, sampling and shuffling. Results do not depend on the number of ranks."""


class TrainerConfig(Section):
    """The training loop."""

    steps: Positive = 100
    """Steps of the run; one step = one rollout batch and its optimizer updates."""
    prompts_per_step: Positive = 16
    """Prompts (= groups) sampled in each step."""
    group_size: Positive = 16
    """Responses to each prompt."""
    responses_per_update: Positive = 16
    """Responses per optimizer update, drawn across groups."""
    epochs_per_step: Positive = 1
    """Epochs over the responses of a step."""
    tokens_per_microbatch: Positive = 16384
    """Token budget of one micro-batch on one data-parallel rank (prompts and padding included)."""
    ranks: Positive = 1
    """Processes that `g2rl train` starts when it is not already inside torchrun or Slurm."""
    max_nonfinite_updates: Positive = 3
    """Consecutive updates skipped for a non-finite loss or gradient before the run stops."""
    stop_after: Duration | None = None
    """Time after which the run saves and exits with code 75, such as 3h50m; leave time for all updates of a step and a
    save."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates per step if no group is dropped."""
        return self.prompts_per_step * self.group_size // self.responses_per_update * self.epochs_per_step


class CheckpointConfig(Section):
    """Saving and resuming (docs/checkpoints.md)."""

    every_steps: Positive = 20
    """Steps between checkpoints; one is also saved at the end and on a stop request."""
    keep: Positive = 2
    """Number of latest checkpoints to keep."""
    best_metric: Literal["pass_at_1", "pass_at_n", "maj_at_n"] | None = "pass_at_1"
    """Also keep the checkpoint with the best value of this evaluation metric, if there is one; null: latest only."""
    asynchronous: bool = True
    """Write checkpoints in the background while training continues."""
    resume: bool = True
    """Resume from the latest checkpoint of the run if there is one."""
    on_corruption: Literal["error", "previous"] = "error"
    """If the latest checkpoint is corrupt: `error` stops; `previous` sets it aside and uses the previous one."""
    load_optimizer: bool = True
    """Load the optimizer and schedule on resume; false: reinitialize them (the run then differs from an uninterrupted
    one)."""
    allow_changed: Annotated[tuple[str, ...], BeforeValidator(comma_separated)] = ()
    """Keys that may differ on resume although they define the experiment, such as `[data.source]`; on the command line
    also `data.source,run.seed`."""
    export_hf_every: Positive | None = None
    """Steps between exports of the weights as a Hugging Face folder (`hf/step_N` in the run folder); null: never."""


class LoggingConfig(Section):
    """Outputs in addition to metrics.jsonl (docs/metrics.md)."""

    tensorboard: bool = True
    """Also write metrics and responses for TensorBoard, to `tensorboard` in the run folder."""
    wandb_project: str | None = None
    """Weights & Biases project to which metrics are also sent; null: none, and wandb is not required."""
    responses_every_steps: NonNegative = 10
    """Steps between writes of a few responses to responses.jsonl, starting with the first step; 0: never."""
