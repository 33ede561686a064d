"""The interface of rollout engines, and the sampling settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from megatron_g2rl.errors import UserError
from megatron_g2rl.records import Prompt, Response, ResponseGroup, Stream, response_seed

OnGroup = Callable[[ResponseGroup], None]
"""Called with each group, or requested part of a group, as soon as all its responses are generated."""
Finished = Mapping[int, Sequence[Response | None]]
"""Responses of an earlier call by prompt id, in group order; None: not generated yet."""
Stop = Callable[[], bool]
"""Returns whether generation is to stop now; called at every token, so it must be cheap."""


class RolloutError(UserError, ValueError):
    """The rollout engine cannot start with this model, these settings or these packages."""


class RolloutStopped(Exception):
    """Generation ended early because `stop` returned True; the engine can be used again."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one step."""

    group_size: int
    """Responses per prompt."""
    temperature: float
    """Softmax temperature; 0: greedy decoding, always the most probable token."""
    max_response_tokens: int
    """A response is truncated after this many tokens."""
    run_seed: int
    """`run.seed`; with `stream`, `step`, the prompt id and the response index, it determines each response's seed."""
    step: int
    """Step number, from 0; in an evaluation, the number of completed steps."""
    top_logprobs: int = 0
    """Number of most probable tokens recorded for each token of a response (`Response.top_ids`); 0: none."""
    stream: Stream = "train"
    """Whether the responses are for training or for an evaluation."""
    top_p: float = 1.0
    """Nucleus sampling: the most probable tokens up to this total probability; 1: all."""
    top_k: int = 0
    """Number of most probable tokens that can be sampled; 0: all."""
    min_p: float = 0.0
    """Smallest probability of a token, relative to that of the most probable one; 0: no limit."""

    def seed(self, prompt: Prompt, index: int) -> int:
        """Seed of the response with this index in the group of `prompt`."""
        return response_seed(self.run_seed, self.stream, self.step, prompt.id, index)


@dataclass(frozen=True)
class RolloutRequest:
    """What one call of `RolloutEngine.generate` is to generate; a wrapper passes on a changed copy (`replace`)."""

    prompts: Sequence[Prompt]
    """The prompts; groups are returned in this order."""
    sampling: Sampling
    """Sampling settings, the same for all prompts."""
    finished: Finished = field(default_factory=dict)
    """Responses of an earlier call with these prompts; they are returned unchanged."""
    parts: Sequence[range] | None = None
    """Response indices to generate and return for each prompt, at least one each; None: all."""
    on_group: OnGroup | None = None
    """Called with each group that has a new response as soon as it is complete, on the leader of its replica."""
    stop: Stop | None = None
    """Ends the call when it returns True."""


class RequestedResponses:
    """The responses that a request asks for; each is identified by (prompt position, response index)."""

    def __init__(self, request: RolloutRequest) -> None:
        """Initialize from the request."""
        self._prompts = request.prompts
        all_indices = [range(request.sampling.group_size)] * len(request.prompts)
        self.parts = all_indices if request.parts is None else list(request.parts)
        """Requested response indices, by prompt position."""
        self.known: dict[tuple[int, int], Response] = {}
        """Responses that need not be generated."""
        for position, prompt in enumerate(request.prompts if request.finished else ()):
            earlier = request.finished.get(prompt.id, ())
            for index in self.parts[position]:
                if index < len(earlier) and earlier[index] is not None:
                    self.known[position, index] = earlier[index]

    def members(self, position: int) -> list[tuple[int, int]]:
        """The requested responses to one prompt."""
        return [(position, index) for index in self.parts[position]]

    def is_known(self, position: int) -> bool:
        """Whether all requested responses to a prompt are known."""
        return all(member in self.known for member in self.members(position))

    def group(self, position: int, drawn: Mapping[tuple[int, int], Response]) -> ResponseGroup | None:
        """The group of a prompt, with new responses taken from `drawn`; None while a response is missing."""
        responses = [self.known.get(member) or drawn.get(member) for member in self.members(position)]
        if None in responses:
            return None
        return ResponseGroup(self._prompts[position], tuple(responses), self.parts[position].start)


class GroupAssembly:
    """Assembles the groups of a request from responses that are generated in any order."""

    def __init__(self, request: RolloutRequest) -> None:
        """Start with the groups that need no new response."""
        self.requested = RequestedResponses(request)
        """The responses that the request asks for."""
        self._on_group = request.on_group
        self._drawn: dict[tuple[int, int], Response] = {}
        positions = [position for position in range(len(request.prompts)) if self.requested.is_known(position)]
        self._groups = {position: self.requested.group(position, {}) for position in positions}

    def add(self, position: int, index: int, response: Response) -> None:
        """Add a response that was not known; the group that it completes is passed to `request.on_group`."""
        self._drawn[position, index] = response
        group = self.requested.group(position, self._drawn)
        if group is None:
            return
        self._groups[position] = group
        for member in self.requested.members(position):
            self._drawn.pop(member, None)
        if self._on_group:
            self._on_group(group)

    def groups(self) -> list[ResponseGroup]:
        """All groups in the order of the prompts; every response must have been added."""
        return [self._groups[position] for position in range(len(self._groups))]


class RolloutEngine(Protocol):
    """Generates responses with its own copy of the policy's weights."""

    def generate(self, request: RolloutRequest) -> list[ResponseGroup]:
        """Generate `sampling.group_size` responses to each prompt of the request, in the order of its prompts.

        Raises:
            RolloutStopped: `request.stop` returned True; responses not yet passed to `request.on_group` are lost.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load new weights, streamed as (Hugging Face name, full tensor), and drop caches of the old ones."""
        ...

    def sleep(self) -> None:
        """Release device memory until `wake`; weights may be lost, so call `load_weights` after `wake`."""
        ...

    def wake(self) -> None:
        """Allocate device memory again."""
        ...

    def close(self) -> None:
        """Release all resources."""
        ...


METHODS = ("generate", "load_weights", "sleep", "wake", "close")
"""What an engine must have."""


class WrappedEngine:
    """Base class of engine wrappers: forwards everything except `generate` to the wrapped engine."""

    def __init__(self, engine: RolloutEngine) -> None:
        """Wrap `engine`."""
        self._engine = engine

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load new weights into the engine; every rank streams all of them."""
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
