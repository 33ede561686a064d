"""A step whose only update computes Φ itself, and from it the rewards and advantages that it trains with.

The micro-batches of the update hold complete groups. The forward of one yields Φ of its groups; novelty, shaped rewards
and advantages follow in the loss, before the backward begins. No old-log-prob pass is made (docs/method.md, section 8).

Which groups are dropped as uniform is known only then, while the loss is normalized over the responses of all kept
groups: micro-batches are normalized over all responses, and gradients and metrics are rescaled at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from megatron_g2rl.algorithm import UpdateTotals, has_spread
from megatron_g2rl.config import Config
from megatron_g2rl.config.feature_pass import known_dropped_groups, update_cannot_compute_features
from megatron_g2rl.distributed.collectives import on_all_ranks
from megatron_g2rl.exploration.methods import StepInputs
from megatron_g2rl.policy.group_pass import accumulate_groups, groups_fit
from megatron_g2rl.policy.packing import PackedBatch, row_mask, sequences_of
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.records import Experience, ResponseGroup, TokenStatistics, group_ids, responses_of
from megatron_g2rl.rewards.distribute import ScoredRewards
from megatron_g2rl.tracking.clock import Clock
from megatron_g2rl.training.collection import (
    compute_reference,
    join_signals,
    learning_signals,
    length_penalties,
    usable_responses,
)
from megatron_g2rl.training.updates import Updates, microbatch_loss, update_metrics

AGGREGATED = ("loss", "policy_loss")
"""Metrics of the loss that are aggregated as the loss is; the others are token means."""


class FusedUpdate:
    """Runs the update of the steps that need no old-log-prob pass."""

    def __init__(self, config: Config, policy: Policy, updates: Updates, ranks: int):
        """Decide from the configuration whether there are any.

        Args:
            config: settings of the run.
            policy: the weights to update.
            updates: counts updates that were not finite.
            ranks: ranks of the run.
        """
        self.config, self.policy, self.updates = config, policy, updates
        self._configured = config.exploration.is_exact and update_cannot_compute_features(config, ranks) is None

    def applies(self, groups: Sequence[ResponseGroup], outcome: ScoredRewards) -> bool:
        """Whether the update of a step with these groups computes Φ; the same on every rank.

        Args:
            groups: all responses of the step.
            outcome: their rewards and correctness.
        """
        if not self._configured:
            return False
        dropped = known_dropped_groups(self.config)
        if dropped != "none":
            responses, ids = responses_of(groups), group_ids(groups)
            rewards = outcome.rewards + length_penalties(responses, self.config).get("overlong", 0.0)
            spread = has_spread(rewards, ids)
            if dropped == "incorrect":
                spread = spread | torch.isin(ids, ids[outcome.correct])
            kept = usable_responses(spread, responses, self.config.algorithm)
            if 3 * int(kept.sum()) < 2 * len(kept):
                return False  # as `feature_pass.steps_with_a_pass` announces
        return groups_fit(self.policy, sequences_of(groups), [len(group.responses) for group in groups])

    def run(
        self, groups: tuple[ResponseGroup, ...], outcome: ScoredRewards, clock: Clock, step: int
    ) -> tuple[Experience, dict[str, float]]:
        """Run the update of a step; a collective.

        Args:
            groups: all responses of the step, the same on every rank; `applies` to them.
            outcome: their rewards.
            clock: measures the phases.
            step: step number, for messages.

        Returns:
            The experience, complete with the old policy's statistics, and metrics of the update.

        Raises:
            TooManyBadUpdates: `trainer.max_nonfinite_updates` consecutive updates were skipped.
        """
        config, policy = self.config, self.policy
        responses, ids = responses_of(groups), group_ids(groups)
        reference = compute_reference(policy, groups, config, clock)
        loss = GroupLoss(config, groups, outcome, reference, policy.context_group)
        with clock.phase("update"):
            metrics, scored = accumulate_groups(
                policy,
                sequences_of(groups),
                [len(group.responses) for group in groups],
                loss,
                prior_logprobs=[response.logprobs for response in responses],
                prior_tolerance=config.exploration.prior_tolerance_in(policy.settings.precision),
            )
        with clock.phase("exploration"):
            # The loss's inputs once more, on every rank: an error inside one rank's loss normally occurs here on all.
            inputs = step_inputs(outcome, ids, scored.features, config)
            signals = learning_signals(inputs, responses, config)
            on_all_ranks(loss.check)
        old = TokenStatistics(scored.logprobs, scored.entropy)
        seconds = scored.feature_seconds
        experience = join_signals(groups, outcome, scored.features, seconds, old, reference, signals)
        with clock.phase("update"):
            return experience, self._apply(experience, metrics, step)

    def _apply(self, experience: Experience, metrics: dict[str, float], step: int) -> dict[str, float]:
        """Apply the accumulated gradients, unless every group was dropped; returns the metrics of the update."""
        if not experience.kept.any():
            return update_metrics([])
        of_tokens, of_loss = rescaling(experience, self.config.algorithm.aggregation)
        metrics = {name: value * (of_loss if name in AGGREGATED else of_tokens) for name, value in metrics.items()}
        result = self.policy.optimizer.apply(metrics["loss"], gradient_scale=of_loss)
        self.updates.count(result, metrics["loss"], step)
        return update_metrics([(result, metrics)])


def step_inputs(
    outcome: ScoredRewards, ids: Int[Tensor, "responses"], features: Float[Tensor, "responses hidden"], config: Config
) -> StepInputs:
    """What the exploration method uses of complete groups, if Φ is all it needs."""
    return StepInputs(outcome.rewards, outcome.correct, ids, features=features, root=config.exploration.root)


def rescaling(experience: Experience, aggregation: str) -> tuple[float, float]:
    """Factors of (token means, loss and gradients) from normalization over all responses to that over the kept ones.

    Exactly 1 if all responses are kept.
    """
    lengths = torch.tensor([len(response.token_ids) for response in experience.responses])
    every, kept = (UpdateTotals(float(x.sum()), float(len(x))) for x in (lengths, lengths[experience.kept]))
    of_tokens = max(every.tokens, 1.0) / max(kept.tokens, 1.0)
    return of_tokens, of_tokens if aggregation == "token_mean" else every.responses / kept.responses


class GroupLoss:
    """The loss of a micro-batch of complete groups (`group_pass.LossWithFeatures`), normalized over all responses."""

    def __init__(
        self,
        config: Config,
        groups: Sequence[ResponseGroup],
        outcome: ScoredRewards,
        reference: Sequence[Float[Tensor, "_tokens"]] | None,
        context_group: dist.ProcessGroup | None,
    ):
        """Prepare for one step.

        Args:
            config: settings of the run.
            groups: all responses of the step.
            outcome: their rewards.
            reference: their log-probs under the reference policy, on the host; None: no KL term.
            context_group: ranks that split the tokens of a sequence (context parallelism).
        """
        self._config, self._outcome, self._ids = config, outcome, group_ids(groups)
        self._responses = responses_of(groups)
        self._compute = microbatch_loss(config.algorithm, self._responses, reference, context_group)
        self._failure: Exception | None = None

    def __call__(
        self,
        logprobs: Float[Tensor, "responses positions"],
        entropy: Float[Tensor, "responses positions"],
        features: Float[Tensor, "responses hidden"],
        batch: PackedBatch,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = list(batch.sources)
        mask, advantages = row_mask(batch), self._outcome.rewards.new_zeros(len(rows))
        if rows:
            kept = advantages.bool()
            # Raised here, an error would leave the other ranks waiting in the pass.
            try:
                own = ScoredRewards(self._outcome.rewards[rows], self._outcome.correct[rows], {})
                inputs = step_inputs(own, self._ids[rows], features.cpu(), self._config)
                signals = learning_signals(inputs, [self._responses[row] for row in rows], self._config)
                advantages, kept = signals.advantages, signals.kept
            except Exception as failure:
                self._failure = failure
            mask = mask & kept.to(mask.device)[:, None]
        return self._compute(logprobs, entropy, batch, mask, logprobs.detach(), advantages)

    def check(self) -> None:
        """Raise the error of novelty, shaping or advantages of a micro-batch, if there was one."""
        if self._failure is not None:
            raise self._failure
