"""Records of the training loop: prompts, responses, groups, and the experience that a step collects for its updates.

They are frozen: each stage reads one record and creates the next. Shapes are in the annotations, units in the
docstrings. All annotations of the package use these names of dimensions; the tests check at run time that equal names
in one call have equal sizes:

    responses        responses of a step, an update or a micro-batch, group after group
    tokens           tokens of a micro-batch; in a table [responses, tokens], positions up to the longest response
    positions        the latter, where a call also has the tokens of a micro-batch
    _tokens          tokens of one response, in a list with other lengths (the underscore: not compared)
    response_tokens  response tokens of a micro-batch
    hidden           size of the hidden states and of Φ
    vocab_local      rows of the output embedding on this rank
    top              most probable tokens reported for each position (K)
    _members         responses of one group, in a list of groups of other sizes
    bounds           bounds of the packed sequences: one more than sequences
    tile, columns    tokens and vocabulary rows of one tile of logits
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Stream = Literal["train", "eval"]
"""What responses are generated for; the responses of two streams have different seeds."""


@dataclass(frozen=True)
class Prompt:
    """One problem, rendered and tokenized."""

    id: int
    """Position of the row in its data source: stable across runs, layouts and resumes."""
    text: str
    """The rendered prompt, including the chat template."""
    token_ids: tuple[int, ...]
    """`text` as token ids."""
    answer: str
    """The reference answer that the reward function compares with."""
    source: str = ""
    """Where the row came from, for messages (`file.jsonl:12`)."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Other columns of the row that the reward functions use."""


@dataclass(frozen=True)
class Response:
    """One sampled continuation of a prompt."""

    token_ids: tuple[int, ...]
    """Sampled tokens, including the end-of-sequence token if the model produced it."""
    logprobs: tuple[float, ...]
    """Log-prob of each token (nats) as reported by the rollout engine, at the sampling temperature."""
    text: str
    """`token_ids` decoded without special tokens."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the model ended the response; `length`: truncated at `rollout.max_response_tokens`."""
    seed: int
    """Sampling seed: `records.response_seed(run_seed, stream, step, prompt_id, index)`."""
    top_ids: np.ndarray | None = field(default=None, compare=False, repr=False)
    """int32 [tokens, K]: the most probable tokens at each position; None if they were not requested."""
    top_logprobs: np.ndarray | None = field(default=None, compare=False, repr=False)
    """float16 [tokens, K]: log-probs of `top_ids` (nats), under the same distribution as `logprobs`."""

    def drop_topk(self) -> Response:
        """A copy without `top_ids` and `top_logprobs`, which use most of the memory."""
        return self if self.top_ids is None else replace(self, top_ids=None, top_logprobs=None)


@dataclass(frozen=True)
class ResponseGroup:
    """All responses to one prompt of one step, or a consecutive part of them."""

    prompt: Prompt
    responses: tuple[Response, ...]
    first: int = 0
    """Index in the group of the first of `responses`; above 0 only if a group is sampled in parts."""


@dataclass(frozen=True)
class TokenStatistics:
    """Log-prob and entropy of every response token under one policy; the same on every rank."""

    logprobs: tuple[Float[Tensor, "_tokens"], ...]
    """Per response: log-probs of its tokens (nats, float32)."""
    entropy: tuple[Float[Tensor, "_tokens"], ...]
    """Per response: full-vocabulary entropy at each of its tokens (nats, float32)."""

    def joined(self, other: TokenStatistics) -> TokenStatistics:
        """The concatenation of these responses and those of `other`."""
        return TokenStatistics(self.logprobs + other.logprobs, self.entropy + other.entropy)


@dataclass(frozen=True)
class ScoredBatch(TokenStatistics):
    """Result of a forward pass over R responses (`Policy.score`)."""

    features: Float[Tensor, "responses hidden"] | None = None
    """Φ of each response (docs/method.md, section 1, float32); None if the pass did not compute it."""
    feature_seconds: dict[str, float] = field(default_factory=dict)
    """Time of Φ in seconds: `features` (the computation) and `reduce` (sums over ranks); empty without Φ."""
    hidden: Float[Tensor, "responses hidden"] | None = None
    """Mean last hidden state over the tokens of each response (float32); None if the pass did not compute it."""


@dataclass(frozen=True)
class ValueEstimates:
    """Estimates from a critic's values for the responses of a step, on the host: numbers per token (float32)."""

    values: tuple[Float[Tensor, "_tokens"], ...]
    """Value of the state before each token, under the critic before the updates of the step."""
    returns: tuple[Float[Tensor, "_tokens"], ...]
    """Targets of the values."""
    advantages: tuple[Float[Tensor, "_tokens"], ...]
    """Generalized advantage estimates, normalized over the step with `algorithm.normalize_std`."""


@dataclass(frozen=True)
class Experience:
    """The R responses of a step, group after group; complete when it is made, and the same on every rank."""

    groups: tuple[ResponseGroup, ...]
    rewards: Float[Tensor, "responses"]
    """Base rewards: in [-1, 1] from one reward function, or the weighted sum of several."""
    correct: Bool[Tensor, "responses"]
    """True for correct responses, independent of their reward."""
    shaped: Float[Tensor, "responses"]
    """Shaped rewards r~, with the over-long penalty; equal to the base rewards without exploration and penalty."""
    advantages: Float[Tensor, "responses"]
    """With a critic: the mean over the tokens of each response."""
    kept: Bool[Tensor, "responses"]
    """True for responses used by the updates; False for those of dropped groups and for masked ones."""
    features: Float[Tensor, "responses hidden"] | None = None
    """Φ of each response (docs/method.md, section 1, float32); None if exploration does not use it."""
    novelty: Float[Tensor, "responses"] | None = None
    """Novelty ν of each response; None without features."""
    old_statistics: TokenStatistics | None = None
    """Statistics under the old (behavior) policy, from the forward pass that computed Φ; None if none was necessary."""
    reference_logprobs: tuple[Float[Tensor, "_tokens"], ...] | None = None
    """Per response: log-probs under the frozen reference policy (nats); None if the loss has no KL term."""
    estimates: ValueEstimates | None = None
    """Values and advantages of tokens; None without a critic."""
    reward_parts: dict[str, Float[Tensor, "responses"]] = field(default_factory=dict)
    """Unweighted rewards of each reward function, if there are several; NaN where a function failed."""
    forms: tuple[str | None, ...] | None = None
    """Canonical form of each correct response, "" for other responses, None where the reward function gives none
    (`rewards.distribute.ScoredRewards`); None without forms."""
    penalties: dict[str, Float[Tensor, "responses"]] = field(default_factory=dict)
    """What was added to the rewards in addition to shaping: `overlong` (part of `shaped`) and `kl` (not part of it)."""
    exploration_seconds: dict[str, float] = field(default_factory=dict)
    """Time spent on exploration: `features` (Φ), `reduce` (sums over ranks), `shaping` (ν and rewards)."""

    @property
    def responses(self) -> list[Response]:
        return responses_of(self.groups)

    @property
    def group_ids(self) -> Int[Tensor, "responses"]:
        """Index of the group of each response."""
        return group_ids(self.groups)

    @property
    def groups_kept(self) -> int:
        """Number of groups that the updates use."""
        return len(self.group_ids[self.kept].unique())

    def joined(self, other: Experience) -> Experience:
        """The concatenation of this experience and `other`, which was collected with the same settings."""
        columns = {
            name: torch.cat([value, getattr(other, name)])
            for name in ("rewards", "correct", "shaped", "advantages", "kept", "features", "novelty")
            if (value := getattr(self, name)) is not None
        }
        old, reference = self.old_statistics, self.reference_logprobs
        return replace(
            self,
            groups=self.groups + other.groups,
            old_statistics=old and old.joined(other.old_statistics),
            reference_logprobs=reference and reference + other.reference_logprobs,
            forms=self._joined_forms(other),
            reward_parts=_joined(self.reward_parts, other.reward_parts),
            penalties=_joined(self.penalties, other.penalties),
            exploration_seconds={
                name: own + other.exploration_seconds[name] for name, own in self.exploration_seconds.items()
            },
            **columns,
        )

    def _joined_forms(self, other: Experience) -> tuple[str | None, ...] | None:
        if self.forms is None and other.forms is None:
            return None
        return sum((each.forms or (None,) * len(each.rewards) for each in (self, other)), ())


def _joined(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([own, second[name]]) for name, own in first.items()}


def responses_of(groups: Sequence[ResponseGroup]) -> list[Response]:
    """All responses, group after group."""
    return [response for group in groups for response in group.responses]


def group_ids(groups: Sequence[ResponseGroup]) -> Int[Tensor, "responses"]:
    """Index of the group of each response."""
    return torch.repeat_interleave(torch.arange(len(groups)), torch.tensor([len(g.responses) for g in groups]))


def stream_position(stream: Stream, step: int) -> int:
    """A number that identifies a step of a stream: `step` in training, -1 - `step` in an evaluation."""
    return step if stream == "train" else -1 - step


def response_seed(run_seed: int, stream: Stream, step: int, prompt_id: int, index: int) -> int:
    """Seed of one response: a 63-bit hash of its position in the run, independent of layout and world size.

    Args:
        run_seed: `run.seed`.
        stream: training or evaluation.
        step: step number, from 0; in an evaluation, the number of completed steps.
        prompt_id: `Prompt.id`.
        index: position of the response in its group.
    """
    import hashlib

    key = f"{run_seed}/{stream_position(stream, step)}/{prompt_id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
