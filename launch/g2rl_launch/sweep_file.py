"""Sweeps: one YAML file describes many runs of one configuration (launch/README.md).

Every point of `grid` combined with every entry of `runs` is a run; `sweep` runs them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

from pydantic import Field

from g2rl_launch.profile import Line
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.keys import config_keys, nearest_names
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.reading import Format, read_model, read_override
from megatron_g2rl.config.sections.base import Positive, Section
from megatron_g2rl.config.source import Entry
from megatron_g2rl.config.tree import Config

Value = str | int | float | bool | None


class Sweep(Section):
    """Many runs of one configuration."""

    config: Path
    """Configuration of all runs; a relative path starts in the folder where `g2rl sweep` is called."""
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
    """One run of a sweep."""

    name: str
    """Name of the run."""
    overrides: tuple[str, ...]
    """`key=value` texts, `run.name` included."""
    config: Config
    """The configuration that results from the file and the overrides."""


def load_sweep(file: Path) -> tuple[Sweep, list[Point]]:
    """Read a sweep and its runs.

    Raises:
        ConfigError: all keys that are unknown or invalid, with their lines in the sweep's file, and duplicate names.
    """
    sweep, tree = read_model(_SWEEP, file)
    problems = list(_wrong_keys(sweep, tree))
    if problems:
        raise ConfigError.listing(f"{file} cannot be used", problems)
    points = []
    for values, locations in _values(sweep):
        try:
            points.append(_point(sweep, values, locations, tree, file))
        except ConfigError as error:
            lines = str(error).splitlines()
            problems += [line.removeprefix("  - ") for line in lines[1:] or lines]
    clashes = [name for name, times in Counter(point.name for point in points).items() if times > 1]
    problems += [
        f"{tree.origin_of(('name',))}: several runs are named {name}; put every key that varies into name"
        for name in clashes
    ]
    if problems:
        raise ConfigError.listing(f"{file} cannot be used", list(dict.fromkeys(problems)))
    return sweep, points


Location = tuple[str, ...]


def _values(sweep: Sweep) -> Iterator[tuple[dict[str, Value], dict[str, Location]]]:
    """Values of each run by key, and the locations of these values in the file."""
    for number, entry in enumerate(sweep.runs):
        locations = {key: ("grid", key) for key in sweep.grid} | {key: ("runs", str(number), key) for key in entry}
        for combination in product(*sweep.grid.values()):
            yield {**dict(zip(sweep.grid, combination, strict=True)), **entry}, locations


def _wrong_keys(sweep: Sweep, tree: Entry) -> Iterator[str]:
    locations = [("grid", key) for key in sweep.grid]
    locations += [("runs", str(number), key) for number, entry in enumerate(sweep.runs) for key in entry]
    for location in locations:
        key, origin = location[-1], tree.origin_of(location)
        if key == "run.name":
            yield f"{origin}: run.name is set by name:"
        elif key not in config_keys():
            nearest = nearest_names(key, list(config_keys()))
            yield f"{origin}: unknown key {key}. Nearest valid key: {' or '.join(nearest)}"
        elif location[0] == "runs" and key in sweep.grid:
            yield f"{origin}: {key} is under grid: and under runs:; remove one"
    if any(text.startswith("run.name=") for text in sweep.overrides):
        yield f"{tree.origin_of(('overrides',))}: run.name is set by name:"


def _point(
    sweep: Sweep, values: Mapping[str, Value], locations: Mapping[str, Location], tree: Entry, file: Path
) -> Point:
    named = f"run.name={_name(sweep, values, tree, file)}"
    entries = [read_override(text).placed(tree.origin_of(("overrides",))) for text in sweep.overrides]
    written = [f"{key}={written_value(value)}" for key, value in values.items()]
    for key, text in zip(values, written, strict=True):
        entries.append(read_override(text).placed(tree.origin_of(locations[key])))
    config = load_config(sweep.config, [*entries, named])
    return Point(config.run.name, (*sweep.overrides, *written, named), config)


def _name(sweep: Sweep, values: Mapping[str, Value], tree: Entry, file: Path) -> str:
    """The name of a run; characters that are not allowed in a name are removed from values."""

    def filled(match: re.Match) -> str:
        keys = [key for key in values if match[1] in (key, key.rpartition(".")[2])]
        if len(keys) != 1:
            known = ", ".join(values) or "nothing"
            raise ConfigError(
                f"{tree.origin_of(('name',))}: {match[0]} in name is not a key that the run sets ({known})"
            )
        return _sign(values[keys[0]])

    if sweep.name is not None:
        return re.sub(r"\{([^{}]*)\}", filled, sweep.name)
    return "-".join([_sign(file.stem), *(f"{key.rpartition('.')[2]}_{_sign(value)}" for key, value in values.items())])


def _sign(value: Value) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", written_value(value)).strip("-")


def written_value(value: Value) -> str:
    """A value in the syntax of the command line."""
    if isinstance(value, str) and read_override(f"a={value}").value["a"].value == value:
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool | None) else str(value)


_SWEEP = Format(Sweep, "is not a sweep", shows_values=False)
