"""Comparison of the configurations of runs, their differences, and their batch ledgers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.ledger import LedgerRow, batch_ledger
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.model_shape import read_model_shape
from megatron_g2rl.config.tree import Config
from megatron_g2rl.report.runs import Run

ABSENT = "\N{EN DASH}"
"""Placeholder for a key that the configuration of a run does not have."""
WITHOUT_EFFECT = ("run.name", "run.directory", "checkpoint.", "logging.")
"""Prefixes of keys that do not affect the results of a run."""


@dataclass(frozen=True)
class SettingRow:
    """One key and its values in all runs."""

    key: str
    values: list[str]
    differs: bool


def setting_rows(runs: Sequence[Run]) -> list[SettingRow]:
    """All keys of all runs, in the order of their files."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = []
    for key in keys:
        values = [setting(run, key) for run in runs]
        known = {value for value, run in zip(values, runs, strict=True) if run.settings}
        rows.append(SettingRow(key, values, len(known) > 1))
    return rows


def setting(run: Run, key: str) -> str:
    """A value as YAML, or a dash if the run has no such key."""
    return _text(run.settings[key]) if key in run.settings else ABSENT


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value if value.strip() == value and value else repr(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


def differing(rows: Sequence[SettingRow]) -> list[SettingRow]:
    """Rows that differ and can affect the results, including the seed."""
    return [row for row in rows if row.differs and not row.key.startswith(WITHOUT_EFFECT)]


def same_setting_groups(runs: Sequence[Run]) -> list[list[int]]:
    """Groups of indices of runs that differ only in the seed; a run without configuration is its own group."""
    groups: dict[Any, list[int]] = {}
    for number, run in enumerate(runs):
        known = {k: _text(v) for k, v in run.settings.items() if not k.startswith((*WITHOUT_EFFECT, "run.seed"))}
        groups.setdefault(tuple(sorted(known.items())) or number, []).append(number)
    return list(groups.values())


@dataclass(frozen=True)
class Ledger:
    """The batch ledger of a run, or the reason why it is missing."""

    rows: list[LedgerRow]
    problem: str = ""


def ledger(run: Run) -> Ledger:
    """What one step and one update of the run consist of, with `trainer.ranks` ranks."""
    file = run.folder / "config.yaml"
    if not file.is_file():
        return Ledger([], "the run has no config.yaml")
    try:
        config = load_config(file)
        ranks = _ranks(config)
        return Ledger(batch_ledger(config, ranks, _shape(config)))
    except ConfigError as error:
        first = str(error).splitlines()[:2][-1].strip(" -")  # the line below the title, if there is one
        return Ledger([], f"its config.yaml is not valid in this version ({first})")


def _ranks(config: Config) -> int:
    """`trainer.ranks`, or the ranks of one model copy if a launcher set the number."""
    policy = config.policy
    copy = policy.tensor_parallel * policy.pipeline_parallel * policy.context_parallel
    return max(config.trainer.ranks, copy, config.rollout.tensor_parallel)


def _shape(config: Config):
    try:
        return read_model_shape(config.model.path)
    except ConfigError:
        return None  # the model has been moved; the ledger omits the rows that need it
