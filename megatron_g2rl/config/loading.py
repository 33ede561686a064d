"""Reads YAML files and command-line overrides into a `Config`, and writes a `Config` as YAML.

A file may extend another one with `base: other.yaml` (relative to itself; chains are allowed): sections are merged
key by key, any other value replaces that of the base. Overrides are applied last. Relative paths inside the
configuration are relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import yaml

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.matching import config_of
from megatron_g2rl.config.source import Entry, read_override, read_yaml
from megatron_g2rl.config.tree import Config

BASE = "base"


def load_config(path: Path | str, overrides: Sequence[str | Entry] = ()) -> Config:
    """Read a configuration file, its bases and overrides such as `algorithm.kl_coefficient=0`.

    Args:
        path: the file.
        overrides: texts, or trees of values that do not come from the command line.

    Raises:
        ConfigError: a file cannot be read, bases form a cycle, keys are unknown or repeated, values are missing or of
            the wrong type. Problems of all files and overrides are reported together.
    """
    path = Path(path)
    layers = [*_with_bases(path, ()), *_overrides(overrides)]
    return config_of(reduce(merge, layers), path)


def merge(below: Entry, above: Entry) -> Entry:
    """Merge two trees: mappings key by key; any other value of `above` replaces that of `below`."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    both = {name: merge(below.value[name], above.value[name]) for name in above.value if name in below.value}
    return Entry({**below.value, **above.value, **both}, above.origin)


def dump_config(config: Config) -> str:
    """The complete configuration, including defaults, as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def files_of(path: Path) -> list[Path]:
    """A configuration file and its bases; `load_config` must have read them without an error."""
    base = read_yaml(path).value.get(BASE)
    return [path, *(files_of(path.parent / base.value) if base else ())]


def _with_bases(path: Path, above: tuple[Path, ...]) -> list[Entry]:
    """The trees of the file and its bases, the most distant base first."""
    if above and path.resolve() in [file.resolve() for file in above]:
        raise ConfigError("bases form a cycle: " + " -> ".join(map(str, (*above, path))))
    entry = read_yaml(path)
    base = entry.value.pop(BASE, None)
    if base is None:
        return [entry]
    if not isinstance(base.value, str):
        raise ConfigError(f"{base.origin}: base must be the name of one other file, not {base.text or base.value!r}")
    file = path.parent / base.value
    if not file.is_file():
        raise ConfigError(f"{base.origin}: the base {file} does not exist (base is relative to {path.name})")
    return [*_with_bases(file, (*above, path)), entry]


def _overrides(texts: Sequence[str | Entry]) -> list[Entry]:
    entries, problems = [], []
    for text in texts:
        try:
            entries.append(text if isinstance(text, Entry) else read_override(text))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError.listing("overrides cannot be read", problems)
    return entries
