"""Differences between the configuration of a checkpoint and that of the run that resumes from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.keys import config_keys
from megatron_g2rl.config.renamed import current_key
from megatron_g2rl.config.tree import Config

_DEFINING = (
    "run.seed",
    "model.",
    "data.",
    "reward.function",  # and reward.functions
    "reward.arguments",
    "reward.correct_",
    "exploration.",
    "algorithm.",
    "rollout.temperature",
    "rollout.max_response_tokens",
    "rollout.stop",
    "rollout.incomplete_responses",
    "trainer.prompts_per_step",
    "trainer.group_size",
    "trainer.responses_per_update",
    "trainer.epochs_per_step",
)
"""Keys (or sections) that define the experiment: after a change, earlier steps belong to a different one."""

_LEARNING = (*_DEFINING, "optimizer.", "trainer.steps", "policy.precision", "rollout.engine")
"""Keys that determine the weights after every step, independent of the parallel layout."""

_SAME_NUMBERS = {"exploration.source": ("auto", "exact")}
"""Values of a key that differ only in speed: changing between them does not make it a different experiment."""

_UNRESTRICTED = ("run.name", "run.directory", "checkpoint.", "logging.")
"""Keys that may change freely when a run resumes."""


@dataclass(frozen=True)
class Change:
    """One key whose value has changed."""

    key: str
    before: Any
    now: Any

    @property
    def makes_another_run(self) -> bool:
        """Whether the steps before and after the change belong to different experiments."""
        equal = _SAME_NUMBERS.get(self.key, ())
        return self.key.startswith(_DEFINING) and not (self.before in equal and self.now in equal)

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.before)} -> {json.dumps(self.now)}"


def changes(before: Mapping[str, Any], config: Config) -> list[Change]:
    """Keys whose value differs, in the order of the configuration.

    Args:
        before: `config.model_dump(mode="json")` of the earlier run; for a key that it lacks (an older version) the
            default is assumed, and a renamed key is read under its current name.
        config: the current configuration.
    """
    now = _flat(config.model_dump(mode="json"))
    old = {path: (key.default if not key.required else None) for path, key in config_keys().items()}
    old |= {path: None for path in old if before.get(path.partition(".")[0], 0) is None}
    old |= {current_key(path): value for path, value in _flat(before).items()}
    return [
        Change(path, old[path], now.get(path))
        for path in config_keys()
        if not path.startswith(_UNRESTRICTED) and _plain(old[path]) != now.get(path)
    ]


def check_changes(before: Mapping[str, Any], config: Config, where: object) -> list[Change]:
    """The changes of a resumed run, if all of them are allowed.

    Args:
        before, config: as for `changes`.
        where: the checkpoint, for the message.

    Raises:
        ConfigError: lists all changes that would make it a different run and are not in `checkpoint.allow_changed`.
    """
    allowed = set(config.checkpoint.allow_changed)
    unknown = sorted(allowed - set(config_keys()))
    if unknown:
        raise ConfigError(f"checkpoint.allow_changed: no such configuration key: {', '.join(unknown)}")
    all_changes = changes(before, config)
    refused = [c for c in all_changes if c.makes_another_run and c.key not in allowed]
    if refused:
        raise ConfigError.listing(
            f"{where} was saved with a different configuration, and resuming would mix two experiments: choose another "
            "run.name, restore these keys, or resume anyway with "
            f"checkpoint.allow_changed={','.join(change.key for change in refused)}",
            [str(change) for change in refused],
        )
    return all_changes


def fingerprint(config: Config) -> str:
    """A digest of all keys that determine the weights; sampled responses are reused only under the same digest."""
    flat = _flat(config.model_dump(mode="json"))
    learning = {key: value for key, value in flat.items() if key.startswith(_LEARNING)}
    learning |= {key: values[-1] for key, values in _SAME_NUMBERS.items() if learning[key] in values}
    return hashlib.blake2b(json.dumps(learning, sort_keys=True).encode(), digest_size=8).hexdigest()


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{name}.{leaf}": value
        for name, section in sections.items()
        if isinstance(section, Mapping)
        for leaf, value in section.items()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, (str, int, float, bool, list, dict, type(None))) else str(value)
