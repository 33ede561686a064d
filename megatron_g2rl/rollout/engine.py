"""What every rollout engine can do, and the sampling settings it is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_g2rl.errors import UserError
from megatron_g2rl.records import Prompt, ResponseGroup


class RolloutError(UserError, ValueError):
    """The sampler cannot be started with this model, these settings or these packages."""


@dataclass(frozen=True)
class Sampling:
    """How the responses of one step are drawn."""

    group_size: int
    """Responses to each prompt."""
    temperature: float
    """Softmax temperature."""
    max_response_tokens: int
    """A response is cut after this many tokens."""
    run_seed: int
    """`run.seed`; with `step`, the prompt id and the response's index it fixes every response's seed."""
    step: int
    """Step number, from 0."""


class RolloutEngine(Protocol):
    """A sampler that holds a copy of the policy's weights."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[ResponseGroup]:
        """Draw `sampling.group_size` responses to each prompt, in the order of `prompts`."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take new weights, streamed as (Hugging Face name, full tensor), and forget what the old ones cached."""
        ...

    def sleep(self) -> None:
        """Give device memory back until `wake`; weights may be lost, `load_weights` follows `wake`."""
        ...

    def wake(self) -> None:
        """Take device memory again."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
