"""Reward functions and their workers."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_g2rl.config.sections.base import Arguments, CallSeconds, FunctionPath, Positive, Section


class RewardFunctionConfig(Section):
    """One of several reward functions; keys that it omits have their value from `reward`."""

    function: FunctionPath
    """As `reward.function`."""
    weight: float = 1.0
    """Weight of its reward in the sum; 0: only logged."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = None
    """Name of its metrics (`reward/NAME/mean`); null: the part of `function` after the colon."""
    arguments: Arguments = {}
    """Keyword arguments of this function."""
    deadline_s: CallSeconds | None = None
    batch_size: Positive | None = None

    @property
    def label(self) -> str:
        """The name of its metrics."""
        return self.name or self.function.rpartition(":")[2]


class RewardConfig(Section):
    """How responses are scored (docs/rewards.md)."""

    function: FunctionPath = "megatron_g2rl.rewards:math_reward"
    """`package.module:name` of a function or a class. It takes a response and its reference answer, or the values that
    its parameter names select, and returns a number in [-1, 1] or a pair (reward, correct)."""
    functions: tuple[RewardFunctionConfig, ...] = ()
    """Several functions instead of one, whose weighted rewards are summed: a list of mappings with `function`,
    `weight`, `name`, `arguments`, and `deadline_s` and `batch_size` where they differ from the keys in this section."""
    correct_by: str | None = None
    """With `functions`: name of the function that decides whether a response is correct. Required for two or more."""
    correct_above: float = 0.0
    """A response is correct if its reward, by the deciding function, is above this value; ignored for functions that
    return a pair (reward, correct)."""
    flip_probability: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Noisy rewards, for studies: probability that training gets the negative reward of a response and the opposite of
    its correctness. The same text is always flipped or never; evaluations have no noise."""
    arguments: Arguments = {}
    """Keyword arguments of `function`, or of the constructor of a class, such as `{url: "http://node7:8000"}`."""
    workers: Positive = 2
    """Worker processes per rank; each loads every function once."""
    deadline_s: CallSeconds = 5.0
    """Time limit of one call in seconds; after it, the worker is killed and the response is scored as incorrect."""
    batch_size: Positive = 16
    """Maximum responses per call of a batch function, or concurrent calls of an async function per worker."""

    def each_function(self) -> tuple[RewardFunctionConfig, ...]:
        """All reward functions, with omitted values filled in."""
        parts = self.functions or (RewardFunctionConfig(function=self.function, arguments=self.arguments),)
        return tuple(
            part.model_copy(
                update={
                    "deadline_s": part.deadline_s or self.deadline_s,
                    "batch_size": part.batch_size or self.batch_size,
                }
            )
            for part in parts
        )

    def uses(self, function: str) -> bool:
        """Whether `function` is one of the reward functions."""
        return any(part.function == function for part in self.each_function())

    @property
    def key(self) -> str:
        """The configuration key that names the function or functions."""
        return "reward.functions" if self.functions else "reward.function"

    @property
    def decides_correctness(self) -> int:
        """Index in `each_function` of the function that decides whether a response is correct."""
        labels = [part.label for part in self.each_function()]
        return labels.index(self.correct_by) if self.correct_by else 0
