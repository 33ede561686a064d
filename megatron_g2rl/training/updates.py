"""Optimizer updates of one step, and where the old log-probs come from.

The loss compares with the policy that sampled. The first update of a step is made with the weights that sampled: its
own log-probs are the ones to compare with, and its responses need no score pass. All others get one, unless Φ has asked
for a pass over all responses before (`exploring.score_groups`).
"""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from megatron_g2rl.algorithm import Totals, training_loss, truncated_importance_weights
from megatron_g2rl.config import Config
from megatron_g2rl.config.tree import AlgorithmConfig
from megatron_g2rl.data.batching import plan_updates
from megatron_g2rl.errors import UserError
from megatron_g2rl.experience import Experience, boolean_row_mask, rows_of
from megatron_g2rl.policy.head import TokenScores
from megatron_g2rl.policy.packing import PackedBatch, to_tokens
from megatron_g2rl.policy.policy import Policy, RowLoss


class TooManyBadUpdates(UserError):
    """Updates in a row had a loss or gradient that was not finite."""


class Updates:
    """Plans and makes the updates of each step."""

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy
        self.bad = 0
        """Updates in a row, the last ones made, whose loss or gradient was not finite."""

    def plan(self, experience: Experience, step: int) -> list[list[int]]:
        """Indices of the responses of each update."""
        t = self.config.trainer
        usable = experience.kept.nonzero().squeeze(1).tolist()
        seed = self.config.run.seed * 1_000_003 + step
        plan = plan_updates(len(usable), t.responses_per_update, t.epochs_per_step, seed)
        return [[usable[i] for i in chosen] for chosen in plan]

    def score_rest(self, experience: Experience, plan: list[list[int]]) -> Experience:
        """Score what no pass has seen and the first update will not see; a collective."""
        first = set(plan[0] if plan else ())
        rest = [i for i, seen in enumerate(experience.scored.logprobs) if seen is None and i not in first]
        if not rest:
            return experience
        sequences = experience.sequences
        found = self.policy.score([sequences[i] for i in rest], features=False)
        return replace(experience, scored=experience.scored.filled(rest, found))

    def make(self, experience: Experience, plan: list[list[int]], step: int) -> tuple[Experience, dict[str, float]]:
        """The updates of a step; the experience with all its scores, and means of metrics over the applied updates.

        Args:
            experience: after `score_rest`.
            plan: of this step.
            step: its number, for messages.

        Raises:
            TooManyBadUpdates: `trainer.max_nonfinite_updates` in a row were skipped.
        """
        total: dict[str, float] = {}
        applied, all_sequences = 0, experience.sequences
        for members in plan:
            sequences = [all_sequences[i] for i in members]
            seen: list[tuple[PackedBatch, TokenScores]] = []
            first = experience.scored.logprobs[members[0]] is None
            loss = update_loss(
                self.config.algorithm, experience, members, self.policy.context_group, seen if first else None
            )
            result, metrics = self.policy.update(sequences, loss)
            if first:
                found = self.policy.assemble(sequences, seen)
                experience = replace(experience, scored=experience.scored.filled(members, found))
            self.bad = 0 if result.applied else self.bad + 1
            if result.applied:
                applied += 1
                metrics |= dict(gradient_norm=result.gradient_norm, learning_rate=result.learning_rate)
                for name, value in metrics.items():
                    total[name] = total.get(name, 0.0) + value
            if self.bad >= self.config.trainer.max_nonfinite_updates:
                raise TooManyBadUpdates(
                    f"step {step + 1}: {self.bad} updates in a row had a loss or gradient that is not finite (loss "
                    f"{metrics['loss']}, gradient norm {result.gradient_norm}); the newest checkpoint is intact; lower "
                    "optimizer.learning_rate or look at the responses of this step"
                )
        means = {f"update/{name}": value / applied for name, value in total.items()}
        return experience, means | {"update/count": float(len(plan)), "update/skipped": float(len(plan) - applied)}


def update_loss(
    algorithm: AlgorithmConfig,
    experience: Experience,
    members: list[int],
    context_group: dist.ProcessGroup | None,
    seen: list[tuple[PackedBatch, TokenScores]] | None = None,
) -> RowLoss:
    """The loss of the update on the responses `members` of a step, to be called once a micro-batch.

    Args:
        algorithm: which loss.
        experience: the step's responses with their log-probs and advantages.
        members: indices of the update's responses; `batch.sources` index this list.
        context_group: ranks that share the tokens of a sequence.
        seen: given for responses without log-probs: the update's own are taken, without gradient, and put here with
            their entropy, a micro-batch each.
    """
    a, e = algorithm, experience
    old = None if seen is not None else [e.scored.logprobs[i] for i in members]
    sampler = [e.advantages.new_tensor(e.responses[i].logprobs) for i in members]
    reference = e.reference_logprobs and [e.reference_logprobs[i] for i in members]
    advantages = e.advantages[members]
    totals = Totals(tokens=sum(map(len, sampler)), responses=len(members))

    def loss(logprobs, entropy, batch):
        mask, weights = boolean_row_mask(batch), None
        old_rows = logprobs.detach() if old is None else rows_of(old, batch, mask)
        if seen is not None:
            seen.append((batch, TokenScores(*(to_tokens(x.detach(), batch) for x in (logprobs, entropy)), None)))
        if a.importance_cap is not None:
            weights = truncated_importance_weights(old_rows, rows_of(sampler, batch, mask), mask, a.importance_cap)
        return training_loss(
            logprobs,
            old_rows,
            advantages[list(batch.sources)].to(mask.device),
            mask,
            entropy=entropy,
            reference_logprobs=rows_of(reference, batch, mask) if reference else None,
            kl_coefficient=a.kl_coefficient,
            kl_estimator=a.kl_estimator,
            entropy_coefficient=a.entropy_coefficient,
            aggregation=a.aggregation,
            totals=totals,
            response_tokens=mask.new_tensor(batch.response_tokens, dtype=int),
            clip_low=a.clip_low,
            clip_high=a.clip_high,
            dual_clip=a.dual_clip,
            ratio=a.ratio,
            importance_weights=weights,
            group=context_group,
        )

    return loss
