"""Optimizer updates of one step, and where the old log-probs come from.

The loss takes the ratio to the old (behavior) policy, which generated the responses. In the first update of a step the
current weights are still those of the old policy: its own forward pass gives the old log-probs. All other responses get
an old-log-prob pass, unless Φ already required one over all responses (`Experience.old_statistics`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from megatron_g2rl.algorithm import (
    LossInputs,
    LossOptions,
    UpdateTotals,
    importance_weights,
    training_loss,
)
from megatron_g2rl.config import Config
from megatron_g2rl.config.sections.method import AlgorithmConfig
from megatron_g2rl.data.batching import plan_updates
from megatron_g2rl.errors import UserError
from megatron_g2rl.policy.optimizer import UpdateResult
from megatron_g2rl.policy.packing import row_mask, rows_of, sequences_of
from megatron_g2rl.policy.policy import Policy, RowLoss
from megatron_g2rl.records import Experience, Response, TokenStatistics

Known = dict[int, tuple[Float[Tensor, "_tokens"], Float[Tensor, "_tokens"]]]
"""Index of a response in the step -> log-probs and entropies of its tokens under the old policy."""


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

    def known_statistics(self, experience: Experience, plan: list[list[int]]) -> Known:
        """Statistics under the old policy of all responses, at most without those of the first update; a collective.

        Those that the experience lacks are computed in a forward pass.
        """
        if experience.old_statistics is not None:
            return _by_index(range(len(experience.responses)), experience.old_statistics)
        sequences, first = sequences_of(experience.groups), set(plan[0] if plan else ())
        rest = [i for i in range(len(sequences)) if i not in first]
        if not rest:
            return {}
        return _by_index(rest, self.policy.score([sequences[i] for i in rest], features=False))

    def run(
        self, experience: Experience, plan: list[list[int]], known: Known, step: int
    ) -> tuple[TokenStatistics, dict[str, float]]:
        """Run a step's updates; a collective.

        Args:
            experience: the responses of the step.
            plan: indices of the responses of each update (`plan`).
            known: result of `known_statistics`.
            step: step number, for messages.

        Returns:
            The old policy's statistics of all responses, and metrics averaged over updates.

        Raises:
            TooManyBadUpdates: `trainer.max_nonfinite_updates` consecutive updates were skipped.
        """
        outcomes: list[tuple[UpdateResult, dict[str, float]]] = []
        sequences, known = sequences_of(experience.groups), dict(known)
        for members in plan:
            first = members[0] not in known
            old = None if first else [known[i][0] for i in members]
            loss = update_loss(self.config.algorithm, experience, members, old, self.policy.context_group)
            result, metrics, own = self.policy.update([sequences[i] for i in members], loss, statistics=first)
            if first:
                known |= _by_index(members, own)
            self.count(result, metrics["loss"], step)
            outcomes.append((result, metrics))
        logprobs, entropy = zip(*(known[i] for i in range(len(sequences))), strict=True)
        return TokenStatistics(logprobs, entropy), update_metrics(outcomes)

    def count(self, result: UpdateResult, loss: float, step: int) -> None:
        """Count consecutive updates that were skipped.

        Raises:
            TooManyBadUpdates: there are too many.
        """
        self.bad = count_bad(self.bad, result, loss, step, self.config, "optimizer.learning_rate")


def count_bad(bad: int, result: UpdateResult, loss: float, step: int, config: Config, rate: str) -> int:
    """The number of consecutive skipped updates after one more update.

    Args:
        bad: their number before it.
        result, loss: of the update.
        step: step number, for the message.
        config: has the limit.
        rate: key of the learning rate.

    Raises:
        TooManyBadUpdates: there are too many.
    """
    bad = 0 if result.applied else bad + 1
    if bad >= config.trainer.max_nonfinite_updates:
        raise TooManyBadUpdates(
            f"step {step + 1}: {bad} consecutive updates had a non-finite loss or gradient (loss {loss}, gradient norm "
            f"{result.gradient_norm}); the latest checkpoint is intact; lower {rate} or inspect the responses of this "
            "step"
        )
    return bad


def update_metrics(outcomes: Sequence[tuple[UpdateResult, dict[str, float]]]) -> dict[str, float]:
    """Metrics of a step's updates (result and metrics of each): means over the applied ones, and their counts."""
    total: dict[str, float] = {}
    applied = 0
    for result, metrics in outcomes:
        if result.applied:
            applied += 1
            metrics = metrics | dict(gradient_norm=result.gradient_norm, learning_rate=result.learning_rate)
            for name, value in metrics.items():
                total[name] = total.get(name, 0.0) + value
    means = {f"update/{name}": value / applied for name, value in total.items()}
    return means | {"update/count": float(len(outcomes)), "update/skipped": float(len(outcomes) - applied)}


def _by_index(indices: Sequence[int], statistics: TokenStatistics) -> Known:
    return dict(zip(indices, zip(statistics.logprobs, statistics.entropy, strict=True), strict=True))


def loss_options(algorithm: AlgorithmConfig) -> LossOptions:
    """The options of the loss in a configuration."""
    options = LossOptions(**{field.name: getattr(algorithm, field.name) for field in fields(LossOptions)})
    return replace(options, kl_coefficient=0.0) if algorithm.use_kl_in_reward else options


def update_loss(
    algorithm: AlgorithmConfig,
    experience: Experience,
    members: list[int],
    old_logprobs: Sequence[Float[Tensor, "_tokens"]] | None,
    context_group: dist.ProcessGroup | None,
) -> RowLoss:
    """The loss function of one update on the responses `members`; called once per micro-batch.

    Args:
        algorithm: loss settings.
        experience: the step's responses with their rollout log-probs and advantages.
        members: indices of the update's responses; `batch.sources` index this list.
        old_logprobs: of each of them, on the host; None: the current weights are those of the old policy, so the
            log-probs of the update itself are used, without gradient.
        context_group: ranks that split the tokens of a sequence (context parallelism).
    """
    responses, reference = experience.responses, experience.reference_logprobs
    reference = reference and [reference[i] for i in members]
    compute = microbatch_loss(algorithm, [responses[i] for i in members], reference, context_group)
    advantages, estimates = experience.advantages[members], experience.estimates
    of_tokens = estimates and [estimates.advantages[i] for i in members]

    def loss(logprobs, entropy, batch):
        mask = row_mask(batch)
        old = logprobs.detach() if old_logprobs is None else rows_of(old_logprobs, batch, mask)
        chosen = rows_of(of_tokens, batch, mask) if of_tokens else advantages[list(batch.sources)]
        return compute(logprobs, entropy, batch, mask, old, chosen)

    return loss


def microbatch_loss(
    algorithm: AlgorithmConfig,
    responses: Sequence[Response],
    reference: Sequence[Float[Tensor, "_tokens"]] | None,
    context_group: dist.ProcessGroup | None,
) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """(log-probs, entropy, batch, mask, old log-probs, advantages) -> (loss, metrics) of a micro-batch.

    Normalized over all `responses`. Of the arguments, all but the batch are tables or columns over its rows; advantages
    of responses are on the host.

    Args:
        algorithm: loss settings.
        responses: of the update; `batch.sources` index this list.
        reference: log-probs of each of them under the reference policy, on the host; None: no KL term.
        context_group: as in `update_loss`.
    """
    rollout_logprobs = [torch.tensor(response.logprobs) for response in responses]
    options = loss_options(algorithm)
    totals = UpdateTotals(tokens=sum(map(len, rollout_logprobs)), responses=len(responses))

    def compute(logprobs, entropy, batch, mask, old, advantages):
        weights = None
        if algorithm.importance_cap is not None or algorithm.rejection_bounds is not None:
            weights = importance_weights(
                old,
                rows_of(rollout_logprobs, batch, mask),
                mask,
                cap=algorithm.importance_cap,
                level=algorithm.importance_level,
                bounds=algorithm.rejection_bounds,
                cp_group=context_group,
            )
        inputs = LossInputs(
            logprobs,
            old,
            advantages.to(mask.device),
            mask,
            entropy=entropy,
            reference_logprobs=rows_of(reference, batch, mask) if reference else None,
            importance_weights=weights,
            response_tokens=mask.new_tensor(batch.response_tokens, dtype=int),
        )
        return training_loss(inputs, options, totals, context_group)

    return compute
