"""Comparison of the configurations of groups of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_g2rl.report.groups import METHOD, SEED, RunGroup, differing_keys, setting

MOST_VALUES = 6
"""Values that are shown of a key that has one for each run, such as its name."""


@dataclass(frozen=True)
class SettingRow:
    """One key and its values."""

    key: str
    values: list[str]
    """By group if it differs between groups; else the different values of all runs."""
    differs: bool
    """Whether it differs between groups and can affect the results."""


def setting_rows(groups: Sequence[RunGroup]) -> list[SettingRow]:
    """All keys of all runs but those in the summary, in the order of their files."""
    runs = [run for group in groups for run in group.runs]
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.settings) if key not in (METHOD, SEED)]
    differing = set(differing_keys([group.settings for group in groups]))
    rows = []
    for key in keys:
        if key in differing:
            rows.append(SettingRow(key, [setting(group.settings, key) for group in groups], True))
            continue
        values = list(dict.fromkeys(setting(run.settings, key) for run in runs))
        if len(values) > MOST_VALUES:
            values = [*values[: MOST_VALUES - 1], f"… ({len(values) - MOST_VALUES + 1} more)"]
        rows.append(SettingRow(key, values, False))
    return rows
