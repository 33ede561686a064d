"""Comparison of the configurations of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_g2rl.report.runs import Run

ABSENT = "\N{EN DASH}"
"""Placeholder for a key that the configuration of a run does not have."""
IN_SUMMARY = ("run.seed", "exploration.method")
"""Keys whose values are in the table at the top."""
WITHOUT_EFFECT = ("run.name", "run.directory", "checkpoint.", "logging.")
"""Prefixes of keys that do not affect the results of a run."""


@dataclass(frozen=True)
class SettingRow:
    """One key and its values in all runs."""

    key: str
    values: list[str]
    differs: bool
    """Whether it differs between runs and can affect the results."""


def setting_rows(runs: Sequence[Run]) -> list[SettingRow]:
    """All keys of all runs but those in the summary, in the order of their files."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.settings) if key not in IN_SUMMARY]
    rows = []
    for key in keys:
        values = [setting(run, key) for run in runs]
        known = {value for value, run in zip(values, runs, strict=True) if run.settings}
        rows.append(SettingRow(key, values, len(known) > 1 and not key.startswith(WITHOUT_EFFECT)))
    return rows


def setting(run: Run, key: str) -> str:
    """A value as YAML, or a dash if the run has no such key."""
    return _text(run.settings[key]) if key in run.settings else ABSENT


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value if value.strip() == value and value else repr(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def same_setting_groups(runs: Sequence[Run]) -> list[list[int]]:
    """Groups of indices of runs that differ only in the seed; a run without configuration is its own group."""
    groups: dict[Any, list[int]] = {}
    for number, run in enumerate(runs):
        known = {k: _text(v) for k, v in run.settings.items() if not k.startswith((*WITHOUT_EFFECT, "run.seed"))}
        groups.setdefault(tuple(sorted(known.items())) or number, []).append(number)
    return list(groups.values())
