"""Reads YAML files and command-line overrides into a `Config`, and writes a `Config` as YAML.

Relative paths inside the configuration are relative to the working directory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from megatron_g2rl.config import renamed
from megatron_g2rl.config.keys import config_keys
from megatron_g2rl.config.reading import Format, read_model
from megatron_g2rl.config.source import Entry
from megatron_g2rl.config.tree import Config


def load_config(path: Path | str, overrides: Sequence[str | Entry] = ()) -> Config:
    """Read a configuration file, its bases and overrides such as `algorithm.kl_coefficient=0`.

    Args:
        path: the file.
        overrides: texts, or trees of values that do not come from the command line.

    Raises:
        ConfigError: a file cannot be read, bases form a cycle, keys are unknown or repeated, values are missing or of
            the wrong type. Problems of all files and overrides are reported together.
    """
    config, _ = read_model(_CONFIG, Path(path), overrides)
    return config


def dump_config(config: Config) -> str:
    """The complete configuration, including defaults, as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _new_name(path: str, entry: Entry) -> str | None:
    """What to do about a key or a value that has been renamed or removed."""
    if path in renamed.REMOVED:
        return renamed.REMOVED[path]
    if path in renamed.KEYS:
        return f"{path} is now called {renamed.KEYS[path]}; rename it"
    new = renamed.VALUES.get((path, entry.value)) if isinstance(entry.value, str) else None
    return f"{entry.value} is now called {new}" if new else None


def _missing_source(tree: Entry) -> Iterator[str]:
    """`data.source` is required unless `data.sources` is set, which a single key cannot express."""
    _, single = tree.find(("data", "source"))
    several, names = tree.find(("data", "sources"))
    if len(single) < 2 and not (len(names) == 2 and several.value):
        key = config_keys()["data.source"]
        yield f"{tree.origin}: {key.path} is missing; it has no default. {key.description}"


_CONFIG = Format(Config, "is not a valid configuration", hint=_new_name, check=_missing_source)
