"""What changed between the configuration that a checkpoint was saved under and the one that resumes from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.keys import config_keys
from megatron_g2rl.config.tree import Config

_DEFINING = (
    "run.seed",
    "model.",
    "warm_start.",
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
"""Keys (or sections) with another value of which the steps so far belong to another experiment."""

_LEARNING = (*_DEFINING, "optimizer.", "trainer.steps", "policy.precision", "rollout.engine")
"""Keys that have a say in the weights at every step, whatever the layout."""

_PASSING = ("run.name", "run.directory", "checkpoint.", "logging.")
"""Keys that are of no interest when a run goes on."""


@dataclass(frozen=True)
class Change:
    """One key with another value than before."""

    key: str
    before: Any
    now: Any

    @property
    def makes_another_run(self) -> bool:
        """Whether the steps before and after it belong to different experiments."""
        return self.key.startswith(_DEFINING)

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.before)} -> {json.dumps(self.now)}"


def changes(before: Mapping[str, Any], config: Config) -> list[Change]:
    """Keys whose value differs, in the order of the configuration.

    Args:
        before: `config.model_dump(mode="json")` of the earlier run; a key that it lacks (of an older version) counts
            as having had its default.
        config: the present one.
    """
    now = _flat(config.model_dump(mode="json"))
    found = {path: (key.default if not key.required else None) for path, key in config_keys().items()}
    found |= {path: None for path in found if before.get(path.partition(".")[0], 0) is None}
    found |= _flat(before)
    return [
        Change(path, found[path], now.get(path))
        for path in config_keys()
        if not path.startswith(_PASSING) and _plain(found[path]) != now.get(path)
    ]


def check_changes(before: Mapping[str, Any], config: Config, where: object) -> list[Change]:
    """The changes of a resumed run, all of them allowed.

    Args:
        before, config: as for `changes`.
        where: what is resumed, for the message.

    Raises:
        ConfigError: some would make it another run and are not named in `checkpoint.allow_changed`; lists them all.
    """
    allowed = {name.strip() for name in config.checkpoint.allow_changed.split(",") if name.strip()}
    unknown = sorted(allowed - set(config_keys()))
    if unknown:
        raise ConfigError(f"checkpoint.allow_changed names {', '.join(unknown)}, which is no configuration key")
    found = changes(before, config)
    # The built-in model is taught in the run's precision: in another one the KL reference would be another model.
    taught = ("policy.precision",) if config.warm_start is not None else ()
    refused = [c for c in found if (c.makes_another_run or c.key in taught) and c.key not in allowed]
    if refused:
        raise ConfigError.listing(
            f"{where} was saved under another configuration, going on would make it another run: choose another "
            "run.name, set these keys back, or go on all the same with "
            f"checkpoint.allow_changed={','.join(change.key for change in refused)}",
            [str(change) for change in refused],
        )
    return found


def fingerprint(config: Config) -> str:
    """A digest of everything that has a say in the weights: responses sampled under another one are not its own."""
    flat = _flat(config.model_dump(mode="json"))
    telling = {key: value for key, value in flat.items() if key.startswith(_LEARNING)}
    return hashlib.blake2b(json.dumps(telling, sort_keys=True).encode(), digest_size=8).hexdigest()


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
