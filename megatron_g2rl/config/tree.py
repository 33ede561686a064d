"""The typed configuration tree: combines the sections in `config/sections/`.

Every field is followed by its documentation, from which docs/configuration.md is made, and names include units. Values
that are invalid on their own are rejected by the sections; `checks.py` has the cross-field checks. `loading.py` reads
YAML and the command line into this tree.
"""

from __future__ import annotations

from typing import Any

from pydantic import PrivateAttr

from megatron_g2rl.config.sections.base import Section
from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.config.sections.evaluation import EvaluationConfig
from megatron_g2rl.config.sections.method import AlgorithmConfig, ExplorationConfig
from megatron_g2rl.config.sections.model import ModelConfig, OptimizerConfig, PolicyConfig
from megatron_g2rl.config.sections.rewards import RewardConfig
from megatron_g2rl.config.sections.rollout import RolloutConfig
from megatron_g2rl.config.sections.run import CheckpointConfig, LoggingConfig, RunConfig, TrainerConfig


class Config(Section):
    """Everything that defines a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    exploration: ExplorationConfig = ExplorationConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    policy: PolicyConfig = PolicyConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig | None = None

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def model_post_init(self, context: Any) -> None:
        """Store the validation context: the origin of each key, `file.yaml:12` or `command line`."""
        self._origins = dict(context or {})

    def __eq__(self, other: object) -> bool:
        """Whether both have the same values, regardless of origin."""
        if not isinstance(other, Config):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in Config.model_fields)

    @property
    def policy_updates(self) -> int:
        """Optimizer updates of the policy in the run if no group is dropped: none while a critic warms up."""
        steps = max(0, self.trainer.steps - self.algorithm.critic_warmup_steps)
        return steps * self.trainer.updates_per_step

    def origin_of(self, key: str) -> str | None:
        """Where the value of a key such as `model.path` was written (`file.yaml:12`); None: it is a default."""
        return self._origins.get(key)
