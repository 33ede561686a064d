"""Settings of `g2rl warm-start FILE`: the model to create, and how it is fine-tuned before any run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_g2rl.config.checks import layout_problems
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.inputs import model_folder_problems
from megatron_g2rl.config.reading import Format, read_model
from megatron_g2rl.config.sections.base import (
    FilePath,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    TaskName,
    TaskNames,
)
from megatron_g2rl.config.sections.model import ModelConfig, PolicyConfig
from megatron_g2rl.config.world import launched_world_size


class WarmStart(Section):
    """A model that is fine-tuned on worked examples of a built-in task by a short supervised run."""

    output: FilePath
    """Folder to write, an ordinary Hugging Face folder."""
    model: ModelConfig | None = None
    """Model to start from, as in a run; null: a small, randomly initialized Qwen3 with a tokenizer for the task."""
    task: TaskName = "arithmetic"
    """Built-in task of the worked examples (docs/data.md)."""
    mixed_with: TaskNames | None = None
    """Further built-in tasks, whose worked examples take turns with those of `task`; null: none."""
    seed: NonNegative = 0
    """Seed of the random weights and of the worked examples."""
    steps: Positive = 300
    """Supervised optimizer steps."""
    demonstrations_per_step: Positive = 64
    """New worked examples in each step."""
    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate."""
    tokens_per_microbatch: Positive = 16384
    """Token budget of one micro-batch on one data-parallel rank."""
    ranks: Positive = 1
    """Processes that the command starts when it is not already inside torchrun or Slurm."""
    policy: PolicyConfig = PolicyConfig()

    @property
    def family(self) -> str | None:
        """`model.family`."""
        return self.model.family if self.model else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks of the worked examples."""
        return (self.task, *(self.mixed_with or ()))

    @property
    def world_size(self) -> int:
        """Number of ranks: set by the launcher, else `ranks`."""
        return launched_world_size() or self.ranks


def load_warm_start(file: Path, overrides: Sequence[str] = ()) -> WarmStart:
    """Read the settings from a file, its bases and overrides such as `steps=20`.

    Raises:
        ConfigError: lists everything that is invalid, with keys and lines.
    """
    settings, _ = read_model(_FORMAT, file, overrides)
    problems = list(layout_problems(settings.policy, settings.world_size, "ranks"))
    if settings.model is not None:
        problems += model_folder_problems(settings.model.path)
    if problems:
        raise ConfigError.listing(f"{file} cannot be used", problems)
    return settings


_FORMAT = Format(WarmStart, "is not a valid configuration of a warm start")
