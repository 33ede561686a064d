"""Records of the training loop: prompts, responses, groups, and the results of the old-log-prob pass.

They are frozen: each stage reads one record and creates the next. Shapes are in the annotations, units in the
docstrings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
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
class ScoredBatch:
    """Statistics of the R responses of a step under the old (behavior) policy; the same on every rank."""

    logprobs: tuple[Float[Tensor, "tokens"] | None, ...]
    """Per response: log-probs of its tokens under the old policy (nats, float32); None until a pass computes them."""
    entropy: tuple[Float[Tensor, "tokens"] | None, ...]
    """Per response: full-vocabulary entropy at each token (nats, float32); None until a pass computes it."""
    features: Float[Tensor, "responses hidden"] | None
    """Φ of each response (docs/method.md, section 1, float32), or None if exploration does not use it."""
    explore_seconds: dict[str, float] = field(default_factory=dict)
    """Time spent on exploration, seconds: `features` (Φ), `reduce` (sums over ranks), `shaping` (ν and rewards)."""

    def filled(self, indices: Sequence[int], part: ScoredBatch) -> ScoredBatch:
        """A copy whose log-probs and entropy of the responses at `indices` are those of `part`, in order."""
        logprobs, entropy = list(self.logprobs), list(self.entropy)
        for index, logprob, token_entropy in zip(indices, part.logprobs, part.entropy, strict=True):
            logprobs[index], entropy[index] = logprob, token_entropy
        return replace(self, logprobs=tuple(logprobs), entropy=tuple(entropy))


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
