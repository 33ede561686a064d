"""Sweeps: one YAML file describes many runs of one configuration (launch/README.md).

Every point of `grid` together with every entry of `runs` is a run. What happens to them is in `sweeping`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from g2rl_launch.profiles import Line, origin_of, problem_line
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.keys import config_keys
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.matching import nearest_keys
from megatron_g2rl.config.source import Entry, read_override, read_yaml
from megatron_g2rl.config.tree import Config, Positive, Section

Value = str | int | float | bool | None


class Sweep(Section):
    """Many runs of one configuration."""

    config: Path
    """Configuration of all runs; a relative path starts in the folder where `g2rl sweep` is called."""
    cluster: Line | None = None
    """Cluster profile, as for `g2rl launch --cluster`, which wins."""
    concurrency: Positive
    """Runs that are under way at once, at most."""
    name: Line | None = None
    """Names of the runs, such as `lr_{optimizer.learning_rate}`; null: the file's name and all values that vary."""
    overrides: tuple[Line, ...] = ()
    """`key=value` for all runs."""
    grid: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)]] = {}
    """Lists of values by key; every combination is a run."""
    runs: Annotated[tuple[dict[str, Value], ...], Field(min_length=1)] = ({},)
    """Values by key, an entry a run; with a grid, every entry together with every point of it."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """Name of the run."""
    overrides: tuple[str, ...]
    """`key=value` texts, `run.name` among them."""
    config: Config
    """What the file and the overrides describe."""


def load_sweep(file: Path) -> tuple[Sweep, list[Point]]:
    """A sweep and its runs.

    Raises:
        ConfigError: every key that is unknown or wrong, with its line in the sweep's file, and names that clash.
    """
    tree = read_yaml(file)
    try:
        sweep = Sweep.model_validate(_plain(tree))
    except ValidationError as error:
        problems = [
            problem_line(details, tree, file, Sweep) for details in error.errors(include_url=False, include_input=False)
        ]
        raise ConfigError.listing(f"{file} is no sweep", list(dict.fromkeys(problems))) from None
    problems = list(_wrong_keys(sweep, tree, file))
    if problems:
        raise ConfigError.listing(f"{file} cannot be used", problems)
    points = []
    for values, places in _values(sweep):
        try:
            points.append(_point(sweep, values, places, tree, file))
        except ConfigError as error:
            said = str(error).splitlines()
            problems += [line.removeprefix("  - ") for line in said[1:] or said]
    clashes = [name for name, times in Counter(point.name for point in points).items() if times > 1]
    problems += [
        f"{origin_of(tree, ('name',), file)}: several runs are called {name}; every key that varies has to be in name"
        for name in clashes
    ]
    if problems:
        raise ConfigError.listing(f"{file} cannot be used", list(dict.fromkeys(problems)))
    return sweep, points


Place = tuple[str, ...]


def _values(sweep: Sweep) -> Iterator[tuple[dict[str, Value], dict[str, Place]]]:
    """Values of each run by key, and where they stand."""
    for number, entry in enumerate(sweep.runs):
        places = {key: ("grid", key) for key in sweep.grid} | {key: ("runs", str(number), key) for key in entry}
        for combination in product(*sweep.grid.values()):
            yield {**dict(zip(sweep.grid, combination, strict=True)), **entry}, places


def _wrong_keys(sweep: Sweep, tree: Entry, file: Path) -> Iterator[str]:
    places = [("grid", key) for key in sweep.grid]
    places += [("runs", str(number), key) for number, entry in enumerate(sweep.runs) for key in entry]
    for place in places:
        key, origin = place[-1], origin_of(tree, place, file)
        if key == "run.name":
            yield f"{origin}: run.name is made by name:"
        elif key not in config_keys():
            yield f"{origin}: unknown key {key}. Nearest valid key: {' or '.join(nearest_keys(key))}"
        elif place[0] == "runs" and key in sweep.grid:
            yield f"{origin}: {key} is under grid: and under runs:; leave one"
    if any(text.startswith("run.name=") for text in sweep.overrides):
        yield f"{origin_of(tree, ('overrides',), file)}: run.name is made by name:"


def _point(sweep: Sweep, values: Mapping[str, Value], places: Mapping[str, Place], tree: Entry, file: Path) -> Point:
    named = f"run.name={_name(sweep, values, tree, file)}"
    entries = [_placed(read_override(text), origin_of(tree, ("overrides",), file)) for text in sweep.overrides]
    written = [f"{key}={_written(value)}" for key, value in values.items()]
    for key, text in zip(values, written, strict=True):
        entries.append(_placed(read_override(text), origin_of(tree, places[key], file)))
    config = load_config(sweep.config, [*entries, named])
    return Point(config.run.name, (*sweep.overrides, *written, named), config)


def _name(sweep: Sweep, values: Mapping[str, Value], tree: Entry, file: Path) -> str:
    """Values in a name lose the characters that a name may not have."""

    def filled(match: re.Match) -> str:
        found = [key for key in values if match[1] in (key, key.rpartition(".")[2])]
        if len(found) != 1:
            known = ", ".join(values) or "nothing"
            raise ConfigError(
                f"{origin_of(tree, ('name',), file)}: {match[0]} in name is no key that the run sets ({known})"
            )
        return _sign(values[found[0]])

    if sweep.name is not None:
        return re.sub(r"\{([^{}]*)\}", filled, sweep.name)
    return "-".join([_sign(file.stem), *(f"{key.rpartition('.')[2]}_{_sign(value)}" for key, value in values.items())])


def _sign(value: Value) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", _written(value)).strip("-")


def _written(value: Value) -> str:
    """A value as the command line writes it."""
    if isinstance(value, str) and read_override(f"a={value}").value["a"].value == value:
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool | None) else str(value)


def _placed(entry: Entry, origin: str) -> Entry:
    """An override, said to stand at a line of the sweep's file."""
    value = entry.value
    if isinstance(value, dict):
        value = {name: _placed(child, origin) for name, child in value.items()}
    return Entry(value, origin, entry.text)


def _plain(value: Any) -> Any:
    if isinstance(value, Entry):
        return _plain(value.value)
    if isinstance(value, dict):
        return {name: _plain(child) for name, child in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
