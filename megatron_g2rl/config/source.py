"""YAML files and command-line overrides as trees of entries that remember where each value was written.

Scalars follow YAML 1.2: `5e-7` is a number, `010` is ten, `yes` and `on` are text. Left out on purpose: tags, merge
keys (`base:` does that) and several documents in a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_g2rl.config.errors import ConfigError

COMMAND_LINE = "command line"

_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan")
_PLAIN_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
_DEEPEST = 8


@dataclass(frozen=True)
class Entry:
    """A value and where it was written."""

    value: Any
    """A scalar, a list, or a dict of names to entries."""
    origin: str
    """`file.yaml:12` or `command line`."""
    text: str | None = None
    """A scalar as it was written, without quotes."""


def read_yaml(path: Path) -> Entry:
    """The mapping in a YAML file.

    Raises:
        ConfigError: there is no such file, it is not valid YAML, its top is not a mapping, or keys are repeated.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file (looked in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    problems: list[str] = []
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        entry = Entry({}, f"{path}:1") if node is None else _entry(node, lambda line: f"{path}:{line}", problems)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not problems and not isinstance(entry.value, dict):
        problems = [f"{entry.origin}: a configuration is a mapping of sections (`trainer:`), this is not one"]
    if problems:
        raise ConfigError.listing(f"{path} cannot be used", problems)
    return entry


def read_override(text: str) -> Entry:
    """`section.key=value` of the command line as a nested mapping; the value is read as YAML.

    Raises:
        ConfigError: there is no key or no `=`.
    """
    path, equals, written = text.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{COMMAND_LINE}: {text!r} is no override; write section.key=value")
    entry = _override_value(written)
    for name in reversed(names):
        entry = Entry({name: entry}, COMMAND_LINE)
    return entry


def _override_value(written: str) -> Entry:
    """YAML where it is YAML; anything else is text as it stands (`data.plain_template=Q: {problem}`)."""
    problems: list[str] = []
    try:
        node = yaml.compose(written, Loader=yaml.BaseLoader)
        entry = Entry(None, COMMAND_LINE, "") if node is None else _entry(node, lambda _: COMMAND_LINE, problems)
    except yaml.YAMLError:
        return Entry(written, COMMAND_LINE, written)
    if problems:
        raise ConfigError("; ".join(problems))
    return entry if entry.text is not None else Entry(entry.value, entry.origin, written)


def _entry(node: yaml.Node, place: Callable[[int], str], problems: list[str], depth: int = 0) -> Entry:
    origin = place(node.start_mark.line + 1)
    if depth > _DEEPEST:
        problems.append(f"{origin}: nested too deeply")
        return Entry(None, origin)
    if node.tag not in _PLAIN_TAGS:
        problems.append(f"{origin}: the tag {node.tag} means nothing here; remove it")
    if isinstance(node, yaml.ScalarNode):
        return Entry(_plain(node.value) if node.style is None else node.value, origin, node.value)
    if isinstance(node, yaml.SequenceNode):
        return Entry([_entry(child, place, problems, depth + 1).value for child in node.value], origin)
    entries: dict[str, Entry] = {}
    for key, child in node.value:
        name, line = str(key.value), place(key.start_mark.line + 1)
        if name in entries:
            problems.append(f"{line}: {name} is written twice; first at {entries[name].origin}")
        value = _entry(child, place, problems, depth + 1)
        entries.setdefault(name, Entry(value.value, line, value.text))
    return Entry(entries, origin)


def _plain(text: str) -> Any:
    """Value of a scalar that stands without quotes."""
    word = text.lower() if text in (text.lower(), text.upper(), text.capitalize()) else text
    if word in _WORDS:
        return _WORDS[word]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(word.replace(".inf", "inf").replace(".nan", "nan")) if _NUMBER.fullmatch(word) else text
