"""The records that travel round the loop: prompts, responses, groups, and what the score pass says of them.

They are frozen: a stage reads one record and makes the next. Shapes are in the annotations, units in the docstrings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One problem, rendered and tokenized."""

    id: int
    """Position of the row in its data source: stable across runs, layouts and resumes."""
    text: str
    """The rendered prompt, template included."""
    token_ids: tuple[int, ...]
    """`text` as token ids."""
    answer: str
    """The reference answer that the reward function compares with."""
    source: str = ""
    """Where the row came from, for messages (`file.jsonl:12`)."""
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Other columns of the row that the reward functions take."""


@dataclass(frozen=True)
class Response:
    """One sampled continuation of a prompt."""

    token_ids: tuple[int, ...]
    """Sampled tokens, the end-of-sequence token included when the model produced it."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each token under the sampling distribution (temperature included), by the sampler."""
    text: str
    """`token_ids` decoded without special tokens."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the model ended; `length`: cut at `rollout.max_response_tokens`."""
    seed: int
    """Seed it was drawn with: `records.response_seed(run_seed, step, prompt_id, index)`."""
    top_ids: np.ndarray | None = field(default=None, compare=False, repr=False)
    """int32 [tokens, K]: the most probable tokens at each position; None when they were not asked for."""
    top_logprobs: np.ndarray | None = field(default=None, compare=False, repr=False)
    """float16 [tokens, K]: their natural-log probabilities, as those of `logprobs`."""

    def without_top(self) -> Response:
        """The same without `top_ids` and `top_logprobs`, which take most of the memory."""
        return self if self.top_ids is None else replace(self, top_ids=None, top_logprobs=None)


@dataclass(frozen=True)
class ResponseGroup:
    """All responses to one prompt of one step, or consecutive ones of them."""

    prompt: Prompt
    responses: tuple[Response, ...]
    first: int = 0
    """Index of the first of `responses` in the group; above 0 only where a group is drawn in parts."""


@dataclass(frozen=True)
class ScoredBatch:
    """What the policy that sampled says of the R responses of a step; the same on every rank."""

    logprobs: tuple[Float[Tensor, "tokens"] | None, ...]
    """Per response: log p of its tokens under that policy (nats, float32); None while no pass has seen it."""
    entropy: tuple[Float[Tensor, "tokens"] | None, ...]
    """Per response: full-vocabulary entropy at each token (nats, float32); None likewise."""
    features: Float[Tensor, "responses hidden"] | None
    """Φ of each response (docs/method.md, section 1, float32), or None when exploration needs none."""
    explore_seconds: dict[str, float] = field(default_factory=dict)
    """What exploration added, in seconds: `features` (Φ), `reduce` (its sums over ranks), `shaping` (ν and rewards)."""

    def filled(self, places: Sequence[int], found: ScoredBatch) -> ScoredBatch:
        """The same with log-probs and entropy of the responses at `places`, which are those of `found` in order."""
        logprobs, entropy = list(self.logprobs), list(self.entropy)
        for place, logprob, spread in zip(places, found.logprobs, found.entropy, strict=True):
            logprobs[place], entropy[place] = logprob, spread
        return replace(self, logprobs=tuple(logprobs), entropy=tuple(entropy))


def response_seed(run_seed: int, step: int, prompt_id: int, index: int) -> int:
    """Seed of one response: a 63-bit hash of where it stands in the run, so that no layout or world size changes it.

    Args:
        run_seed: `run.seed`.
        step: step number, from 0.
        prompt_id: `Prompt.id`.
        index: position of the response in its group.
    """
    import hashlib

    key = f"{run_seed}/{step}/{prompt_id}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
