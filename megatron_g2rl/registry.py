"""What a configuration can choose by name, and where the code of each name is (docs/extending.md).

An addition is one new file and one line here. The lines are import paths, so that a configuration is checked without
importing torch; code is imported when it is first used. A configuration can also name the user's own code, as
`package.module:name`. A name from anywhere else, such as the `model_type` of a checkpoint, is only looked up.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

from megatron_g2rl.errors import UserError

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class ExtensionError(UserError, ValueError):
    """Code that is chosen by name or import path does not exist, or does not do what its extension point requires."""


class Registry(Mapping[str, Any]):
    """Registered names; `registry[name]` imports the code of a name."""

    def __init__(self, kind: str, paths: dict[str, str]) -> None:
        """Create a registry.

        Args:
            kind: what it registers, for messages.
            paths: import path (`package.module:name`) of each registered name.
        """
        self.kind, self.paths = kind, paths

    def __getitem__(self, name: str) -> Any:
        return _object_at(self.paths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __contains__(self, name: object) -> bool:
        return name in self.paths

    # those of Mapping would import all code to compare it
    __eq__, __hash__ = object.__eq__, object.__hash__

    @property
    def allowed(self) -> str:
        """The allowed values of a configuration key, in words."""
        return f"one of {', '.join(self.paths)}; or package.module:name"

    def check(self, value: str) -> str:
        """Return `value` if it is a registered name or an import path; nothing is imported.

        Raises:
            ValueError: it is neither; the message lists the registered names and the one nearest to it.
        """
        if value in self.paths or is_import_path(value):
            return value
        raise ValueError(f"is not allowed; {self._valid(value)}")

    def _valid(self, wrong: str) -> str:
        nearest = max(self.paths, key=lambda name: SequenceMatcher(None, wrong, name).ratio())
        return f"valid: {self.allowed}; did you mean {nearest}?"

    def load(self, value: str) -> Any:
        """Import the code of a registered name or import path; the caller must trust where `value` comes from.

        Raises:
            ExtensionError: the name is unknown, or the user's code does not exist or raises an error on import.
        """
        if value in self.paths:
            return self[value]
        if not is_import_path(value):
            raise ExtensionError(f"unknown {self.kind} {value!r}; {self._valid(value)}")
        try:
            return _object_at(value)
        except Exception as error:
            raise ExtensionError(f"{self.kind} {value} cannot be imported: {type(error).__name__}: {error}") from error


def is_import_path(value: str) -> bool:
    """Whether `value` has the form `package.module:name`."""
    return _IMPORT_PATH.fullmatch(value) is not None


def _object_at(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


MAPPINGS = Registry(
    "mapping",
    {
        "centered": "megatron_g2rl.exploration.shaping:centered",
        "literal": "megatron_g2rl.exploration.shaping:literal",
        "linear": "megatron_g2rl.exploration.shaping:linear",
        "logistic": "megatron_g2rl.exploration.shaping:logistic",
        "saturating": "megatron_g2rl.exploration.shaping:saturating",
        "within_class": "megatron_g2rl.exploration.classwise:within_class",
        "correct_only": "megatron_g2rl.exploration.classwise:correct_only",
        "label_bands": "megatron_g2rl.exploration.classwise:label_bands",
        "product": "megatron_g2rl.exploration.classwise:product",
    },
)
"""`exploration.mapping`: g(scores, rewards) or g(scores, rewards, correct) of the responses of one group, in [-1, 1]
for rewards in [-1, 1]."""

METHODS = Registry(
    "exploration method",
    {
        "none": "megatron_g2rl.exploration.methods.none:NONE",
        "gradient": "megatron_g2rl.exploration.methods.gradient:GRADIENT",
        "semantic": "megatron_g2rl.exploration.methods.semantic:SEMANTIC",
        "hidden": "megatron_g2rl.exploration.methods.hidden:HIDDEN",
        "partition": "megatron_g2rl.exploration.methods.partition:PARTITION",
        "elliptical": "megatron_g2rl.exploration.methods.elliptical:ELLIPTICAL",
    },
)
"""`exploration.method`: a `Method`."""

BASELINES = Registry(
    "baseline",
    {
        "group_mean": "megatron_g2rl.algorithm.baselines:group_mean",
        "leave_one_out": "megatron_g2rl.algorithm.baselines:leave_one_out",
        "critic": "megatron_g2rl.algorithm.baselines:critic",
    },
)
"""`algorithm.baseline`: baseline(rewards) of the responses of one group; `critic` only names the critic."""

ENGINES = Registry(
    "rollout engine",
    {
        "transformers": "megatron_g2rl.rollout.transformers:from_config",
        "vllm": "megatron_g2rl.rollout.vllm:from_config",
    },
)
"""`rollout.engine`: function(config, model_path, device, endings) that returns a `RolloutEngine`."""

FAMILIES = Registry(
    "model family",
    {
        "qwen3": "megatron_g2rl.policy.models.families:QWEN3",
        "qwen3_moe": "megatron_g2rl.policy.models.families:QWEN3_MOE",
        "qwen2": "megatron_g2rl.policy.models.families:QWEN2",
        "llama": "megatron_g2rl.policy.models.families:LLAMA",
    },
)
"""`model_type` of a checkpoint's config.json, or `model.family`: a `Family`."""

TASKS = Registry(
    "built-in task",
    {
        "arithmetic": "megatron_g2rl.data.tasks.arithmetic:ARITHMETIC",
        "countdown": "megatron_g2rl.data.tasks.countdown:COUNTDOWN",
        "countdown_large": "megatron_g2rl.data.tasks.countdown:COUNTDOWN_LARGE",
        "tracking": "megatron_g2rl.data.tasks.tracking:TRACKING",
        "tracking_long": "megatron_g2rl.data.tasks.tracking:TRACKING_LONG",
        "sorting": "megatron_g2rl.data.tasks.sorting:SORTING",
        "sorting_long": "megatron_g2rl.data.tasks.sorting:SORTING_LONG",
    },
)
"""`builtin:NAME` as `data.source`, or `task` of a warm start: a `Task`."""

TASK_RULES = Registry(
    "rules of a built-in task",
    {
        "countdown": "megatron_g2rl.rewards.tasks.countdown:verify",
        "tracking": "megatron_g2rl.rewards.tasks.tracking:verify",
        "sorting": "megatron_g2rl.rewards.tasks.sorting:verify",
    },
)
"""`Task.name`: verify(response, answer, problem) that returns a `Verdict`; without one, answers are compared by the
verifier."""
