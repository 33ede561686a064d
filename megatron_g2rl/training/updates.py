"""Optimizer updates of one step, and where the old log-probs come from.

The loss takes the ratio to the old (behavior) policy, which generated the responses. In the first update of a step the
current weights are still those of the old policy: its own forward pass gives the old log-probs. All other responses get
an old-log-prob pass, unless Φ already required one over all responses (`collection.score_groups`).
"""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from megatron_g2rl.algorithm import UpdateTotals, training_loss, truncated_importance_weights
from megatron_g2rl.config import Config
from megatron_g2rl.config.tree import AlgorithmConfig
from megatron_g2rl.data.batching import plan_updates
from megatron_g2rl.errors import UserError
from megatron_g2rl.experience import Experience, boolean_row_mask, rows_of
from megatron_g2rl.policy.head import TokenScores
from megatron_g2rl.policy.packing import PackedBatch, to_tokens
from megatron_g2rl.policy.policy import Policy, RowLoss


class TooManyBadUpdates(UserError):
    """Too many consecutive updates had a loss or gradient that was not finite."""


class Updates:
    """Plans and applies the optimizer updates of each step."""

    def __init__(self, config: Config, policy: Policy):
        self.config, self.policy = config, policy
        self.bad = 0
        """Number of most recent consecutive updates whose loss or gradient was not finite."""

    def plan(self, experience: Experience, step: int) -> list[list[int]]:
        """Indices of the responses of each update."""
        t = self.config.trainer
        usable = experience.kept.nonzero().squeeze(1).tolist()
        seed = self.config.run.seed * 1_000_003 + step
        plan = plan_updates(len(usable), t.responses_per_update, t.epochs_per_step, seed)
        return [[usable[i] for i in chosen] for chosen in plan]

    def score_rest(self, experience: Experience, plan: list[list[int]]) -> Experience:
        """Compute old log-probs of responses that have none and are not in the first update; a collective."""
        first = set(plan[0] if plan else ())
        rest = [i for i, known in enumerate(experience.scored.logprobs) if known is None and i not in first]
        if not rest:
            return experience
        sequences = experience.sequences
        scores = self.policy.score([sequences[i] for i in rest], features=False)
        return replace(experience, scored=experience.scored.filled(rest, scores))

    def make(self, experience: Experience, plan: list[list[int]], step: int) -> tuple[Experience, dict[str, float]]:
        """Run a step's updates; returns the experience with all old log-probs, and metrics averaged over updates.

        Args:
            experience: after `score_rest`.
            plan: indices of the responses of each update (`plan`).
            step: step number, for messages.

        Raises:
            TooManyBadUpdates: `trainer.max_nonfinite_updates` consecutive updates were skipped.
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
                scores = self.policy.assemble(sequences, seen)
                experience = replace(experience, scored=experience.scored.filled(members, scores))
            self.bad = 0 if result.applied else self.bad + 1
            if result.applied:
                applied += 1
                metrics |= dict(gradient_norm=result.gradient_norm, learning_rate=result.learning_rate)
                for name, value in metrics.items():
                    total[name] = total.get(name, 0.0) + value
            if self.bad >= self.config.trainer.max_nonfinite_updates:
                raise TooManyBadUpdates(
                    f"step {step + 1}: {self.bad} consecutive updates had a non-finite loss or gradient (loss "
                    f"{metrics['loss']}, gradient norm {result.gradient_norm}); the latest checkpoint is intact; lower "
                    "optimizer.learning_rate or inspect the responses of this step"
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
    """The loss function of one update on the responses `members`; called once per micro-batch.

    Args:
        algorithm: loss settings.
        experience: the step's responses with their log-probs and advantages.
        members: indices of the update's responses; `batch.sources` index this list.
        context_group: ranks that split the tokens of a sequence (context parallelism).
        seen: set for responses without old log-probs: the update's own log-probs are used, detached, and appended here
            with their entropy, one entry per micro-batch.
    """
    a, e = algorithm, experience
    old = None if seen is not None else [e.scored.logprobs[i] for i in members]
    sampler = [e.advantages.new_tensor(e.responses[i].logprobs) for i in members]
    reference = e.reference_logprobs and [e.reference_logprobs[i] for i in members]
    advantages = e.advantages[members]
    totals = UpdateTotals(tokens=sum(map(len, sampler)), responses=len(members))

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
            cp_group=context_group,
        )

    return loss
