"""The loss of one optimizer update, from what the step knows of its responses."""

from __future__ import annotations

import torch.distributed as dist

from megatron_g2rl.algorithm import Totals, training_loss, truncated_importance_weights
from megatron_g2rl.config.tree import AlgorithmConfig
from megatron_g2rl.experience import Experience, boolean_row_mask, rows_of
from megatron_g2rl.policy.policy import RowLoss


def update_loss(
    algorithm: AlgorithmConfig, experience: Experience, members: list[int], context_group: dist.ProcessGroup | None
) -> RowLoss:
    """The loss of the update on the responses `members` of a step, to be called once a micro-batch.

    Args:
        algorithm: which loss.
        experience: the step's responses with their log-probs and advantages.
        members: indices of the update's responses; `batch.sources` index this list.
        context_group: ranks that share the tokens of a sequence.
    """
    a, e = algorithm, experience
    old = [e.scored.logprobs[i] for i in members]
    sampler = [old[0].new_tensor(e.responses[i].logprobs) for i in members]
    reference = e.reference_logprobs and [e.reference_logprobs[i] for i in members]
    advantages = e.advantages[members]
    totals = Totals(tokens=sum(len(x) for x in old), responses=len(members))

    def loss(logprobs, entropy, batch):
        mask = boolean_row_mask(batch)
        old_rows, weights = rows_of(old, batch, mask), None
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
