"""Runs grouped by setting: those of a group differ only in the seed and in keys that do not affect results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_g2rl.errors import UserError
from megatron_g2rl.report.runs import Run, short_labels

ABSENT = "\N{EN DASH}"
"""Placeholder for a key that a configuration does not have."""
METHOD, SEED = "exploration.method", "run.seed"
WITHOUT_EFFECT = ("run.name", "run.directory", "checkpoint.", "logging.", "trainer.stop_after")
"""Prefixes of keys that do not affect the results of a run."""
SHAPING = tuple(f"exploration.{key}" for key in ("mapping", "strength", "reward_clip", "uniform_groups"))
"""Keys that have no effect without an exploration method."""
METHODS = {"gradient": "G2RL", "none": "GRPO", "semantic": "EVOL-RL", "partition": "DARLING"}
"""Display names of the values of `exploration.method`."""

Settings = Mapping[str, Any]
"""A configuration by dotted key; empty if it is unknown."""


@dataclass(frozen=True)
class RunGroup:
    """The runs of one setting, each with a different seed."""

    label: str
    """Unique name: what distinguishes the setting from those of the other groups, or the name of the only run."""
    short: str
    """The label, without the leading words that all runs have in common."""
    runs: tuple[Run, ...]

    @property
    def settings(self) -> Settings:
        """The configuration of the first run."""
        return self.runs[0].settings

    @property
    def seeds(self) -> list[str]:
        """The seed of each run."""
        return [setting(run.settings, SEED) for run in self.runs]


def group_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """The groups of these runs, in the order of their first runs.

    If every run is a group of its own, groups have the names of their runs; else those of their settings.
    """
    members = group_members([setting_key(run.settings) for run in runs], [setting(run.settings, SEED) for run in runs])
    grouped = [tuple(runs[number] for number in group) for group in members]
    names = [group[0].label for group in grouped]
    if len(grouped) == len(runs):
        return [RunGroup(*parts) for parts in zip(names, short_labels(names), grouped, strict=True)]
    labels = setting_labels([group[0].settings for group in grouped], names)
    return [RunGroup(label, label, group) for label, group in zip(labels, grouped, strict=True)]


def setting_key(settings: Settings) -> Hashable:
    """What runs of one group have in common; None for an unknown configuration."""
    ignored = (*WITHOUT_EFFECT, SEED)
    known = {key: as_yaml(value) for key, value in effective(settings).items() if not key.startswith(ignored)}
    return tuple(sorted(known.items())) or None


def effective(settings: Settings) -> Settings:
    """The settings without keys that have no effect because nothing is shaped."""
    if settings.get(METHOD) != "none":
        return settings
    return {key: value for key, value in settings.items() if key not in SHAPING}


def group_members(keys: Sequence[Hashable], seeds: Sequence[str]) -> list[list[int]]:
    """Indices of the members of each group.

    Members have equal keys and different seeds: with the second member of a seed another group begins, so that two
    versions of the code can be compared. A member whose key is None is a group of its own.
    """
    groups: dict[Hashable, list[int]] = {}
    occurrences: Counter[Hashable] = Counter()
    for number, (key, seed) in enumerate(zip(keys, seeds, strict=True)):
        place = (number,) if key is None else (key, occurrences[key, seed])
        occurrences[key, seed] += 1
        groups.setdefault(place, []).append(number)
    return list(groups.values())


def setting_labels(settings: Sequence[Settings], names: Sequence[str]) -> list[str]:
    """A unique label for each setting: its method, and as few of the keys that differ as distinguish it.

    A value that most settings have is not named: beside other methods, GRPO and GRPO with an entropy bonus.

    Args:
        settings: the configurations.
        names: labels of settings that are unknown or, in parentheses, that have the same configuration.
    """
    settings = [effective(each) for each in settings]
    labels = [method_name(each) if each else name for each, name in zip(settings, names, strict=True)]
    keys = [key for key in differing_keys(settings) if key != METHOD]
    while len(set(labels)) < len(labels) and keys:
        values = {key: [setting(each, key) for each in settings] for key in keys}
        key = max(keys, key=lambda key: len(set(zip(labels, values[key], strict=True))))
        keys.remove(key)
        shared = {label for label, count in Counter(labels).items() if count > 1}
        split = {
            label
            for label in shared
            if len({v for v, own in zip(values[key], labels, strict=True) if own == label}) > 1
        }
        usual, count = Counter(values[key]).most_common(1)[0]
        unnamed = usual if count > max(2, len(settings) / 2) else None
        labels = [
            f"{label}, {key.rpartition('.')[2]} {value}" if label in split and value != unnamed else label
            for label, value in zip(labels, values[key], strict=True)
        ]
    repeated = {label for label, count in Counter(labels).items() if count > 1}
    labels = [f"{label} ({name})" if label in repeated else label for label, name in zip(labels, names, strict=True)]
    return [
        f"{label} ({labels[:number].count(label) + 1})" if labels.count(label) > 1 else label
        for number, label in enumerate(labels)
    ]


def differing_keys(settings: Sequence[Settings]) -> list[str]:
    """Keys that can affect results and differ between known configurations, in the order of their files."""
    known = [each for each in settings if each]
    keys = dict.fromkeys(key for each in known for key in each if not key.startswith((*WITHOUT_EFFECT, SEED)))
    return [key for key in keys if len({setting(each, key) for each in known}) > 1]


def find_baseline(settings: Sequence[Settings], names: Sequence[Sequence[str]], wanted: str | None) -> int:
    """Index of the setting with which the others are compared.

    Without `wanted`, the one without exploration; of several, the one with the most usual values of all other keys,
    which is plain GRPO rather than a variant. The first one if all have exploration.

    Args:
        settings: the configurations.
        names: what the user can call each of them: its label, then its runs.
        wanted: the value of `--baseline`.

    Raises:
        UserError: `wanted` is not a name.
    """
    if wanted is not None:
        for number, own in enumerate(names):
            if wanted in own:
                return number
        known = ", ".join(own[0] for own in names)
        raise UserError(f"--baseline {wanted}: there is no such run or setting; name a run, or one of {known}")
    plain = [number for number, each in enumerate(settings) if each.get(METHOD) == "none"]
    if not plain:
        return 0
    settings = [effective(each) for each in settings]
    usual = {key: Counter(setting(each, key) for each in settings) for key in differing_keys(settings)}
    return max(plain, key=lambda number: sum(count[setting(settings[number], key)] for key, count in usual.items()))


def method_name(settings: Settings) -> str:
    """Display name of the exploration method."""
    return METHODS.get(setting(settings, METHOD), setting(settings, METHOD))


def setting(settings: Settings, key: str) -> str:
    """A value as YAML, or a dash if there is no such key."""
    return as_yaml(settings[key]) if key in settings else ABSENT


def as_yaml(value: Any) -> str:
    """A value as one line of YAML."""
    if isinstance(value, str):
        return value if value.strip() == value and value else repr(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
