"""YAML files and values of overrides as trees of entries that record where each value was written.

Scalars follow YAML 1.2: `5e-7` is a number, `010` is ten, `yes` and `on` are text. Deliberately unsupported: tags,
merge keys (use `base:`) and several documents in one file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import yaml

from megatron_g2rl.config.errors import ConfigError

COMMAND_LINE = "command line"

_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan")
_LONGEST_NUMBER = 40
"""Longest number in characters; Python takes minutes to parse one with thousands of digits, or refuses to."""
_PLAIN_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))
_DEEPEST = 8
_LARGEST_FILE = 2**20
"""Largest file in bytes: a hundred times the size of a file with every key."""
_MOST_ENTRIES = 20_000
"""Largest number of values in a file; an alias counts each time it is used."""


@dataclass(frozen=True)
class Entry:
    """A value and its origin."""

    value: Any
    """A scalar, a list of entries, or a dict of names to entries."""
    origin: str
    """`file.yaml:12` or `command line`."""
    text: str | None = None
    """A scalar as written, without quotes."""

    @classmethod
    def of(cls, value: Any, origin: str) -> Entry:
        """The tree of a plain value."""
        if isinstance(value, Mapping):
            return cls({name: cls.of(child, origin) for name, child in value.items()}, origin)
        if isinstance(value, list | tuple):
            return cls([cls.of(child, origin) for child in value], origin)
        plain = str(value) if isinstance(value, PurePath) else value
        return cls(plain, origin, None if plain is None else str(plain))

    def placed(self, origin: str) -> Entry:
        """The same tree, written at `origin`."""
        value = self.value
        if isinstance(value, dict):
            value = {name: child.placed(origin) for name, child in value.items()}
        elif isinstance(value, list):
            value = [child.placed(origin) for child in value]
        return Entry(value, origin, self.text)

    def origin_of(self, location: Sequence[str | int]) -> str:
        """Where the value at a location, or the nearest one that encloses it, was written."""
        return self.find(location)[0].origin

    def find(self, location: Sequence[str | int]) -> tuple[Entry, tuple[str, ...]]:
        """The deepest entry on the way to a location, and the names that lead to it."""
        entry, names = self, ()
        for name in location:
            if isinstance(entry.value, list) and str(name).isdecimal() and int(name) < len(entry.value):
                entry = entry.value[int(name)]
            elif isinstance(entry.value, dict) and name in entry.value:
                entry = entry.value[name]
            else:
                break
            names = (*names, str(name))
        return entry, names


def read_yaml(path: Path) -> Entry:
    """The mapping in a YAML file.

    Raises:
        ConfigError: there is no such file, it is not valid YAML, its top level is not a mapping, or keys are repeated.
    """
    text = _text_of(path)
    problems: list[str] = []
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        entry = Entry({}, f"{path}:1") if node is None else _Reader(lambda line: f"{path}:{line}", problems)(node)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; {_DEEPEST} levels are allowed") from None
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not problems and not isinstance(entry.value, dict):
        problems = [f"{entry.origin}: a configuration is a mapping of sections (`trainer:`), but this is not a mapping"]
    if problems:
        raise ConfigError.listing(f"{path} cannot be used", problems)
    return entry


def _text_of(path: Path) -> str:
    """The text of a regular file that is not larger than a configuration can be."""
    try:
        if not path.is_file():
            if path.is_dir():
                raise ConfigError(f"{path}: is a directory; name a file in it")
            what = "is not a regular file" if path.exists() else f"there is no such file (looked in {Path.cwd()})"
            raise ConfigError(f"{path}: {what}")
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"{path}: is larger than {_LARGEST_FILE} bytes, which is too large for a configuration")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # includes a name that is too long or contains a zero byte
        raise ConfigError(f"{str(path)[:200]!r}: cannot be read: {error}"[:500]) from error


def read_text(written: str) -> Entry:
    """The value of a text key: literal text, a quoted string without its quotes, or null."""
    if written in ("null", "~"):
        return Entry(None, COMMAND_LINE, written)
    if len(written) > 1 and written[0] == written[-1] and written[0] in "\"'":
        try:
            node = yaml.compose(written, Loader=yaml.BaseLoader)
        except yaml.YAMLError:
            node = None
        if isinstance(node, yaml.ScalarNode) and node.style and node.end_mark.index == len(written):
            return Entry(node.value, COMMAND_LINE, node.value)
    return Entry(written, COMMAND_LINE, written)


def read_value(written: str) -> Entry:
    """The parsed value of an override if it is valid YAML as a unit; anything else is literal text.

    Raises:
        ConfigError: it is YAML that is not supported.
    """
    problems: list[str] = []
    if "#" in written:  # YAML would drop the rest as a comment
        return Entry(written, COMMAND_LINE, written)
    try:
        node = yaml.compose(written, Loader=yaml.BaseLoader)
        entry = Entry(None, COMMAND_LINE, "") if node is None else _Reader(lambda _: COMMAND_LINE, problems)(node)
    except RecursionError:
        raise ConfigError(f"{COMMAND_LINE}: nested too deeply; {_DEEPEST} levels are allowed") from None
    except yaml.YAMLError:
        return Entry(written, COMMAND_LINE, written)
    if problems:
        raise ConfigError("; ".join(problems))
    return entry if entry.text is not None else Entry(entry.value, entry.origin, written)


class _Reader:
    """Converts YAML nodes to entries and records problems."""

    def __init__(self, origin_of: Callable[[int], str], problems: list[str]):
        """Prepare to read one file or value.

        Args:
            origin_of: returns the origin (`file.yaml:12`) of a line number.
            problems: list to which problems are appended.
        """
        self._origin_of, self._problems, self._count = origin_of, problems, 0

    def __call__(self, node: yaml.Node, depth: int = 0) -> Entry:
        """The entry of a node and of its children."""
        origin = self._origin_of(node.start_mark.line + 1)
        self._count += 1
        if self._count > _MOST_ENTRIES:
            raise ConfigError(f"{origin}: more than {_MOST_ENTRIES} values (aliases included) in one file")
        if depth > _DEEPEST:
            self._problems.append(f"{origin}: nested too deeply; {_DEEPEST} levels are allowed")
            return Entry(None, origin)
        if node.tag not in _PLAIN_TAGS:
            self._problems.append(f"{origin}: the tag {node.tag[:100]} is not supported; remove it")
        if isinstance(node, yaml.ScalarNode):
            return Entry(_plain(node.value) if node.style is None else node.value, origin, node.value)
        if isinstance(node, yaml.SequenceNode):
            return Entry([self(child, depth + 1) for child in node.value], origin)
        entries: dict[str, Entry] = {}
        for key, child in node.value:
            line = self._origin_of(key.start_mark.line + 1)
            if not isinstance(key, yaml.ScalarNode):
                self._problems.append(f"{line}: a key must be a word, not a list or a mapping")
                continue
            name = key.value
            if name in entries:
                self._problems.append(f"{line}: {name} is written twice; first at {entries[name].origin}")
            value = self(child, depth + 1)
            entries.setdefault(name, Entry(value.value, line, value.text))
        return Entry(entries, origin)


def _plain(text: str) -> Any:
    """Value of an unquoted scalar."""
    word = text.lower() if text in (text.lower(), text.upper(), text.capitalize()) else text
    if word in _WORDS:
        return _WORDS[word]
    if len(text) > _LONGEST_NUMBER:
        return text
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(word.replace(".inf", "inf").replace(".nan", "nan")) if _NUMBER.fullmatch(word) else text
