"""What every rollout engine can do, and the sampling settings it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_g2rl.errors import UserError
from megatron_g2rl.records import Prompt, Response, ResponseGroup

OnGroup = Callable[[ResponseGroup], None]
"""Is handed each group, or part of one that is asked for, as soon as all its responses are drawn."""
Finished = Mapping[int, Sequence[Response | None]]
"""Responses of an earlier call by prompt id, in the order of their group; None: not drawn yet."""
Stop = Callable[[], bool]
"""Whether sampling is to end now; asked at every token, so it must be cheap."""


class RolloutError(UserError, ValueError):
    """The sampler cannot be started with this model, these settings or these packages."""


class RolloutStopped(Exception):
    """Sampling ended before all responses were drawn, because `stop` said so; the engine can be used again."""


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
    top_logprobs: int = 0
    """How many of the most probable tokens come with each token of a response (`Response.top_ids`); 0: none."""


class WantedResponses:
    """The responses that one call of `generate` asks an engine for; each is named (position of its prompt, index)."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        finished: Finished | None,
        parts: Sequence[range] | None,
    ) -> None:
        """Take the arguments of `generate`."""
        self._prompts = prompts
        self.parts = list(parts) if parts is not None else [range(sampling.group_size)] * len(prompts)
        """Indices asked for, by position."""
        self.known: dict[tuple[int, int], Response] = {}
        """Responses that need not be drawn."""
        for position, prompt in enumerate(prompts if finished else ()):
            earlier = finished.get(prompt.id, ())
            for index in self.parts[position]:
                if index < len(earlier) and earlier[index] is not None:
                    self.known[position, index] = earlier[index]

    def members(self, position: int) -> list[tuple[int, int]]:
        """The responses to one prompt."""
        return [(position, index) for index in self.parts[position]]

    def is_known(self, position: int) -> bool:
        """Whether nothing is left to draw for a prompt."""
        return all(member in self.known for member in self.members(position))

    def group(self, position: int, drawn: Mapping[tuple[int, int], Response]) -> ResponseGroup | None:
        """The group of a prompt, with its new responses out of `drawn`; None while one is missing."""
        found = [self.known.get(member) or drawn.get(member) for member in self.members(position)]
        if None in found:
            return None
        return ResponseGroup(self._prompts[position], tuple(found), self.parts[position].start)


class RolloutEngine(Protocol):
    """A sampler that holds a copy of the policy's weights."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        finished: Finished | None = None,
        parts: Sequence[range] | None = None,
        on_group: OnGroup | None = None,
        stop: Stop | None = None,
    ) -> list[ResponseGroup]:
        """Draw `sampling.group_size` responses to each prompt, in the order of `prompts`.

        Args:
            prompts: what is asked.
            sampling: how it is answered.
            finished: responses that an earlier call with these prompts drew; they are returned as they are.
            parts: indices of the responses to each prompt that are drawn and returned, at least one each; None: all.
            on_group: is handed each group with a newly drawn response as soon as it is complete, on the rank that
                leads its replica.
            stop: ends the call when it says True.

        Raises:
            RolloutStopped: `stop` said so; what was not handed to `on_group` is lost.
        """
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


class WrappedEngine:
    """Hands everything but `generate` to the engine inside; what wraps an engine begins from here."""

    def __init__(self, engine: RolloutEngine) -> None:
        """Wrap `engine`."""
        self._engine = engine

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Give the engine new weights; every rank streams all of them."""
        self._engine.load_weights(weights)

    def sleep(self) -> None:
        """Put the engine to sleep."""
        self._engine.sleep()

    def wake(self) -> None:
        """Wake the engine."""
        self._engine.wake()

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()
