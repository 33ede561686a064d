"""The data that a step collects before its updates: responses with their rewards, novelty scores and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from megatron_g2rl.policy.packing import PackedBatch, TokenSequence, row_mask
from megatron_g2rl.records import Response, ResponseGroup, ScoredBatch


@dataclass(frozen=True)
class Experience:
    """The R responses of a step, group after group; the same on every rank."""

    groups: tuple[ResponseGroup, ...]
    rewards: Float[Tensor, "responses"]
    """Base rewards: in [-1, 1] from one reward function, or the weighted sum of several."""
    scored: ScoredBatch
    """Log-probs, entropy and Φ under the old (behavior) policy."""
    reference_logprobs: tuple[Float[Tensor, "tokens"], ...] | None
    """Log-probs under the frozen reference policy (nats); None if the loss has no KL term."""
    scores: Float[Tensor, "responses"] | None
    """Novelty scores ν; None without features."""
    shaped: Float[Tensor, "responses"]
    """Shaped rewards r~; equal to the base rewards without exploration."""
    advantages: Float[Tensor, "responses"]
    kept: Bool[Tensor, "responses"]
    """True for responses used by the updates; False for those of dropped groups."""
    correct: Bool[Tensor, "responses"]
    """True for correct responses, independent of their reward."""
    reward_parts: dict[str, Float[Tensor, "responses"]] = field(default_factory=dict)
    """Unweighted rewards of each reward function, if there are several; NaN where a function failed."""

    @property
    def responses(self) -> list[Response]:
        return responses_of(self.groups)

    @property
    def groups_kept(self) -> int:
        """Number of groups that the updates use."""
        return len(self.group[self.kept].unique())

    @property
    def group(self) -> Int[Tensor, "responses"]:
        """Index of the group of each response."""
        return group_ids(self.groups)

    @property
    def sequences(self) -> list[TokenSequence]:
        return sequences_of(self.groups)

    def joined(self, other: Experience) -> Experience:
        """The concatenation of this experience and `other`."""
        columns = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in _COLUMNS}
        return replace(
            self,
            groups=self.groups + other.groups,
            scored=_join_scored(self.scored, other.scored),
            reference_logprobs=_join(self.reference_logprobs, other.reference_logprobs),
            scores=None if self.scores is None else torch.cat([self.scores, other.scores]),
            reward_parts={
                name: torch.cat([values, other.reward_parts[name]]) for name, values in self.reward_parts.items()
            },
            **columns,
        )


_COLUMNS = ("rewards", "shaped", "advantages", "kept", "correct")


def responses_of(groups: Sequence[ResponseGroup]) -> list[Response]:
    """All responses, group after group."""
    return [response for group in groups for response in group.responses]


def sequences_of(groups: Sequence[ResponseGroup]) -> list[TokenSequence]:
    """Prompt and response tokens of every response."""
    return [TokenSequence(g.prompt.token_ids, r.token_ids) for g in groups for r in g.responses]


def group_ids(groups: Sequence[ResponseGroup]) -> Int[Tensor, "responses"]:
    """Index of the group of each response."""
    return torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([len(g.responses) for g in groups]))


def rows_of(
    values: Sequence[Float[Tensor, "tokens"]], batch: PackedBatch, mask: Bool[Tensor, "rows positions"]
) -> Float[Tensor, "rows positions"]:
    """Per-response values of an update, arranged as the rows of one micro-batch; zero where the mask is False.

    Args:
        values: one tensor per response of the update; `batch.sources` selects those of the micro-batch.
        batch: the micro-batch.
        mask: `row_mask` of the micro-batch; under context parallelism it covers this rank's tokens only.
    """
    table = torch.zeros(mask.shape)
    for row, source in enumerate(batch.sources):
        table[row, : len(values[source])] = values[source]
    return table.to(mask.device) * mask


def boolean_row_mask(batch: PackedBatch) -> Bool[Tensor, "rows positions"]:
    """True at response tokens that this rank holds."""
    return row_mask(batch).bool()


def _join(first, second):
    return None if first is None else first + second


def _join_scored(first: ScoredBatch, second: ScoredBatch) -> ScoredBatch:
    features = None if first.features is None else torch.cat([first.features, second.features])
    seconds = {name: value + second.explore_seconds[name] for name, value in first.explore_seconds.items()}
    return ScoredBatch(first.logprobs + second.logprobs, first.entropy + second.entropy, features, seconds)
