"""Sweeps: one YAML file describes many runs of one configuration (launch/README.md).

Every point of `grid` combined with every entry of `runs` is a run; `sweep` runs them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field

from g2rl_launch.profile import Line
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.reading import Format, read_model, read_override
from megatron_g2rl.config.sections.base import Positive, Section
from megatron_g2rl.config.source import Entry
from megatron_g2rl.config.tree import Config

Value = str | int | float | bool | None
CONFIG = "config"
"""Key of `grid` and `runs` that names the configuration file of a run, instead of a key of the configuration."""


class Sweep(Section):
    """Many runs of one configuration."""

    config: Path | None = None
    """Configuration of all runs; a relative path starts in the folder where `g2rl sweep` is called. null: `grid` or
    `runs` have the key `config`."""
    cluster: Line | None = None
    """Cluster profile, unless the command line gives one; null: this machine, one run after the other."""
    concurrency: Positive | None = None
    """Maximum number of concurrent runs on a cluster."""
    name: Line | None = None
    """Names of the runs, such as `lr_{optimizer.learning_rate}`; null: the file's name and all values that vary."""
    overrides: tuple[Line, ...] = ()
    """`key=value` for all runs."""
    grid: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)]] = {}
    """Lists of values by key; every combination is a run."""
    runs: Annotated[tuple[dict[str, Value], ...], Field(min_length=1)] = ({},)
    """Values by key, one run per entry; with a grid, every entry is combined with every point of it."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its name, `key=value` overrides with `run.name`, and the configuration that results."""

    name: str
    file: Path
    """Configuration file."""
    overrides: tuple[str, ...]
    config: Config


class _Setting(NamedTuple):
    """A value that varies, and the line where it was written."""

    key: str
    value: Value
    origin: str

    @property
    def text(self) -> str:
        return f"{self.key}={written_value(self.value)}"


def load_sweep(file: Path) -> tuple[Sweep, list[Point]]:
    """Read a sweep and its runs.

    Raises ConfigError with all keys that are unknown or invalid, with their lines, and with duplicate names.
    """
    sweep, tree = read_model(_SWEEP, file)
    problems, points = [], []
    for settings in _settings(sweep, tree):
        try:
            points.append(_point(sweep, settings, tree, file))
        except ConfigError as error:
            problems += error.problems
    names = Counter(point.name for point in points)
    where = tree.origin_of(("name",))
    clashes = [name for name, times in names.items() if times > 1]
    problems += [f"{where}: several runs are named {name}; put every key that varies into name" for name in clashes]
    if problems:
        raise ConfigError.listing(f"{file} cannot be used", list(dict.fromkeys(problems)))
    return sweep, points


def _settings(sweep: Sweep, tree: Entry) -> Iterator[list[_Setting]]:
    """The settings of each run, in the order of their start: `runs` vary fastest, then the last key of the grid."""
    grid = [
        [_Setting(key, value, tree.origin_of(("grid", key))) for value in values] for key, values in sweep.grid.items()
    ]
    runs = [
        [_Setting(key, value, tree.origin_of(("runs", str(number), key))) for key, value in entry.items()]
        for number, entry in enumerate(sweep.runs)
    ]
    for combination in product(*grid):
        for own in runs:
            yield [*combination, *own]


def _point(sweep: Sweep, settings: Sequence[_Setting], tree: Entry, file: Path) -> Point:
    written = [(text, tree.origin_of(("overrides",))) for text in sweep.overrides]
    written += [(setting.text, setting.origin) for setting in settings if setting.key != CONFIG]
    for text, origin in written:
        if text.startswith("run.name="):
            raise ConfigError(f"{origin}: run.name is set by name:")
    for setting in settings[len(sweep.grid) :]:
        if setting.key in sweep.grid:
            raise ConfigError(f"{setting.origin}: {setting.key} is under grid: and under runs:; remove one")
    named = f"run.name={_name(sweep, settings, tree, file)}"
    own = next((Path(str(setting.value)) for setting in settings if setting.key == CONFIG), sweep.config)
    if own is None:
        raise ConfigError(f"{file}: config is missing; name the configuration of the runs")
    config = load_config(own, [*(read_override(text).placed(origin) for text, origin in written), named])
    return Point(config.run.name, own, (*(text for text, _ in written), named), config)


def _name(sweep: Sweep, settings: Sequence[_Setting], tree: Entry, file: Path) -> str:
    """The name of a run; characters that are not allowed in a name are removed from values."""
    signs = {
        setting.key: _sign(Path(str(setting.value)).stem if setting.key == CONFIG else setting.value)
        for setting in settings
    }

    def filled(match: re.Match) -> str:
        keys = [key for key in signs if match[1] in (key, key.rpartition(".")[2])]
        if len(keys) == 1:
            return signs[keys[0]]
        known, where = ", ".join(signs) or "nothing", tree.origin_of(("name",))
        raise ConfigError(f"{where}: {match[0]} in name is not a key that the run sets ({known})")

    if sweep.name is not None:
        return re.sub(r"\{([^{}]*)\}", filled, sweep.name)
    return "-".join([_sign(file.stem), *(f"{key.rpartition('.')[2]}_{sign}" for key, sign in signs.items())])


def _sign(value: Value) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", written_value(value)).strip("-")


def written_value(value: Value) -> str:
    """A value in the syntax of the command line."""
    if isinstance(value, str) and read_override(f"a={value}").value["a"].value == value:
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool | None) else str(value)


_SWEEP = Format(Sweep, "is not a sweep", shows_values=False)
