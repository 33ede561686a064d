"""Matches entries to configuration keys; reports unknown keys with the nearest valid one, and invalid values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_g2rl.config import renamed
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.keys import Group, Key, config_groups, config_keys
from megatron_g2rl.config.source import Entry
from megatron_g2rl.config.tree import Config


def config_of(tree: Entry, path: Path) -> Config:
    """The `Config` described by a merged tree of entries.

    Args:
        tree: the entries, with sections at the top level.
        path: the file named by the user, for messages.

    Raises:
        ConfigError: lists every unknown key, invalid value and missing key.
    """
    groups = {group.name: group for group in config_groups()}
    problems: list[str] = []
    plain: dict[str, Any] = {}
    for name, entry in tree.value.items():
        if name not in groups:
            problems.append(_unknown(name, entry))
        elif isinstance(entry.value, dict):
            plain[name] = _section(groups[name], entry, problems)
        elif entry.value is None and groups[name].optional:
            plain[name] = None
        else:
            problems.append(_not_a_section(groups[name], entry))
    config, invalid = _validated(plain, tree, path)
    data = plain.get("data") or {}
    if data.get("source") is None and not data.get("sources") and _entry_at(tree, ["data", "source"]) is None:
        key = config_keys()["data.source"]
        invalid = [*invalid, f"{path}: {key.path} is missing; it has no default. {key.description}"]
    if config is None or problems or invalid:
        raise ConfigError.listing(f"{path} is not a valid configuration", problems + invalid)
    return config


def nearest_keys(name: str) -> list[str]:
    """Valid keys nearest to an unknown one: those with the same last part in other sections, else the most similar."""
    return nearest_names(name, list(config_keys()))


def nearest_names(name: str, known: Sequence[str]) -> list[str]:
    """Dotted names nearest to an unknown one: those with the same last part, else the most similar one."""
    leaf = name.rpartition(".")[2]
    same_leaf = [path for path in known if path.rpartition(".")[2] == leaf]
    return same_leaf or [max(known, key=lambda path: _similarity(name, path))]


def _similarity(name: str, path: str) -> float:
    full = SequenceMatcher(None, name, path).ratio()
    leaves = SequenceMatcher(None, name.rpartition(".")[2], path.rpartition(".")[2]).ratio()
    return max(full, 0.95 * leaves)  # prefer a similar key in the same section


def _section(group: Group, entry: Entry, problems: list[str]) -> dict[str, Any]:
    keys = {key.leaf: key for key in group.keys}
    plain = {}
    for leaf, child in entry.value.items():
        if leaf not in keys:
            problems.append(_unknown(f"{group.name}.{leaf}", child))
            continue
        value = _plain(keys[leaf], child)
        if _fits(keys[leaf], value):
            plain[leaf] = value
        else:
            problems.append(_wrong(keys[leaf], child))
    return plain


def _fits(key: Key, value: Any) -> bool:
    """Whether a value has a type that the key accepts; `Config` checks bounds and choices."""
    if value is None:
        return key.nullable
    return type(value) in key.scalars and (not isinstance(value, float) or math.isfinite(value))


def _plain(key: Key, entry: Entry) -> Any:
    """The plain value; for a text key it is text even if it looks like a number."""
    if not key.is_text or isinstance(entry.value, str) or entry.text is None:
        return _unwrapped(entry.value)
    if entry.value is None and (key.nullable or entry.text):
        return None
    return entry.text


def _unwrapped(value: Any) -> Any:
    """A value without the origins of nested mapping values."""
    if isinstance(value, dict):
        return {name: _unwrapped(child.value) for name, child in value.items()}
    return [_unwrapped(child) for child in value] if isinstance(value, list) else value


def _validated(plain: dict[str, Any], tree: Entry, path: Path) -> tuple[Config | None, list[str]]:
    """The configuration, or None and a list of problems."""
    try:
        return Config.model_validate(plain, context=_origins(tree)), []
    except ValidationError as error:
        problems = []
        for details in error.errors(include_url=False):
            location = [str(part) for part in details["loc"][:2]]
            entry = _entry_at(tree, location)
            if len(details["loc"]) > 2:  # inside a list or a mapping
                inside = ".".join(map(str, details["loc"][2:]))
                problems.append(f"{entry.origin}: {'.'.join(location)} = {_shown(entry)}: {inside}: {details['msg']}")
            elif details["type"] == "missing":
                problems += [] if entry else _missing(location, path)  # an invalid value has already been reported
            elif details["type"] == "value_error":
                reason = details["msg"].removeprefix("Value error, ")
                problems.append(f"{entry.origin}: {'.'.join(location)} = {_shown(entry)} {reason}")
            else:
                problems.append(_wrong(config_keys()[".".join(location)], entry))
        return None, list(dict.fromkeys(problems))


def _origins(tree: Entry) -> dict[str, str]:
    """Where the value of each key was written."""
    sections = {name: entry.value for name, entry in tree.value.items() if isinstance(entry.value, dict)}
    return {f"{name}.{leaf}": child.origin for name, section in sections.items() for leaf, child in section.items()}


def _entry_at(tree: Entry, location: list[str]) -> Entry | None:
    entry = tree
    for name in location:
        if not isinstance(entry.value, dict) or name not in entry.value:
            return None
        entry = entry.value[name]
    return entry


def _missing(location: list[str], path: Path) -> list[str]:
    prefix = ".".join(location)
    required = [key for key in config_keys().values() if key.required and f"{key.path}.".startswith(f"{prefix}.")]
    return [f"{path}: {key.path} is missing; it has no default. {key.description}" for key in required]


def _wrong(key: Key, entry: Entry) -> str:
    new = renamed.VALUES.get((key.path, entry.value)) if isinstance(entry.value, str) else None
    hint = f"; {entry.value} is now called {new}" if new else ""
    return f"{entry.origin}: {key.path} = {_shown(entry)} is not allowed; valid: {key.allowed}{hint}"


def _shown(entry: Entry) -> str:
    return _short(repr(entry.text) if isinstance(entry.value, str) else _written(entry))


def _written(entry: Entry) -> str:
    if isinstance(entry.value, dict):
        return "{" + ", ".join(f"{name}: ..." for name in entry.value) + "}"
    return _short(entry.text if entry.text else json.dumps(entry.value, default=lambda child: child.value))


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _not_a_section(group: Group, entry: Entry) -> str:
    keys = ", ".join(key.leaf for key in group.keys)
    return f"{entry.origin}: {group.name} = {_written(entry)} is not allowed; it is a section with the keys {keys}"


def _unknown(name: str, entry: Entry) -> str:
    sections = [group.name for group in config_groups()]
    if isinstance(entry.value, dict) and "." not in name:
        nearest = max(sections, key=lambda section: SequenceMatcher(None, name, section).ratio())
        return f"{entry.origin}: unknown section {_short(name)}. Nearest valid section: {nearest}"
    if name in config_keys():
        section, _, leaf = name.partition(".")
        return f"{entry.origin}: {name} is command-line syntax; in a file put {leaf}: under {section}:"
    if name in renamed.KEYS:
        return f"{entry.origin}: {name} is now called {renamed.KEYS[name]}; rename it"
    nearest = nearest_keys(name[:200])
    return f"{entry.origin}: unknown key {_short(name)}. Nearest valid key: {' or '.join(nearest)}"
