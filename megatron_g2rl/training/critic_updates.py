"""The critic of a run, and its optimizer updates: in each step, on the same responses as those of the policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_g2rl.algorithm import UpdateTotals, explained_variance, value_loss
from megatron_g2rl.config import Config
from megatron_g2rl.config.sections.model import OptimizerConfig
from megatron_g2rl.policy.critic import Critic, ValueLoss
from megatron_g2rl.policy.optimizer import UpdateResult
from megatron_g2rl.policy.packing import row_mask, rows_of, sequences_of
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.records import Experience, ValueEstimates
from megatron_g2rl.training.updates import count_bad


def critic_optimizer(config: Config) -> OptimizerConfig:
    """The policy's Adam settings with the critic's peak learning rate; the minimum is scaled in proportion."""
    rate, optimizer = config.algorithm.critic_learning_rate, config.optimizer
    minimum = optimizer.min_learning_rate * rate / optimizer.learning_rate
    return optimizer.model_copy(update=dict(learning_rate=rate, min_learning_rate=minimum))


def make_critic(config: Config, policy: Policy) -> Critic | None:
    """The critic of a run with `algorithm.baseline=critic`, else None; a collective."""
    if config.algorithm.baseline != "critic":
        return None
    return Critic(policy, critic_optimizer(config), config.trainer.steps * config.trainer.updates_per_step)


class CriticUpdates:
    """Applies the critic's updates of each step."""

    def __init__(self, config: Config, critic: Critic):
        self.config, self.critic = config, critic
        self.bad = 0
        """Number of most recent consecutive updates whose loss or gradient was not finite."""

    def run(self, experience: Experience, plan: Sequence[list[int]], step: int) -> dict[str, float]:
        """Run the critic's updates of a step, then free the memory that only they need; a collective.

        Args:
            experience: the responses of the step, with estimates.
            plan: indices of the responses of each update (`Updates.plan`).
            step: step number, for messages.

        Returns:
            Metrics: those of the updates are means over the applied ones.

        Raises:
            TooManyBadUpdates: `trainer.max_nonfinite_updates` consecutive updates were skipped.
        """
        outcomes: list[tuple[UpdateResult, dict[str, float]]] = []
        sequences = sequences_of(experience.groups)
        for members in plan:
            loss = critic_loss(experience.estimates, members, self.config.algorithm.value_clip)
            result, metrics = self.critic.update([sequences[i] for i in members], loss)
            self.bad = count_bad(self.bad, result, metrics["loss"], step, self.config, "algorithm.critic_learning_rate")
            outcomes.append((result, metrics))
        self.critic.rest()
        return estimate_metrics(experience.estimates) | critic_metrics(outcomes)


def critic_loss(estimates: ValueEstimates, members: Sequence[int], clip: float | None) -> ValueLoss:
    """The loss of one update of the critic on the responses `members`; called once per micro-batch.

    Args:
        estimates: of all responses of the step.
        members: indices of the update's responses; `batch.sources` index this list.
        clip: `algorithm.value_clip`.
    """
    old, returns = ([column[i] for i in members] for column in (estimates.values, estimates.returns))
    totals = UpdateTotals(tokens=sum(map(len, old)), responses=len(old))

    def loss(values, batch):
        mask = row_mask(batch)
        tables = (rows_of(column, batch, mask) for column in (old, returns))
        return value_loss(values, *tables, mask, clip, totals=totals)

    return loss


def estimate_metrics(estimates: ValueEstimates) -> dict[str, float]:
    """Means of values and returns over the response tokens of the step, and how well the values explain the returns."""
    values, returns = torch.cat(estimates.values), torch.cat(estimates.returns)
    return {
        "critic/value_mean": float(values.mean()),
        "critic/return_mean": float(returns.mean()),
        "critic/explained_variance": explained_variance(values, returns),
    }


def critic_metrics(outcomes: Sequence[tuple[UpdateResult, dict[str, float]]]) -> dict[str, float]:
    """Metrics of the critic's updates (result and metrics of each): means over applied ones, the number of others."""
    applied = [
        metrics | dict(gradient_norm=result.gradient_norm, learning_rate=result.learning_rate)
        for result, metrics in outcomes
        if result.applied
    ]
    means = {f"critic/{name}": sum(m[name] for m in applied) / len(applied) for name in (applied[0] if applied else ())}
    return means | {"critic/skipped": float(len(outcomes) - len(applied))}
