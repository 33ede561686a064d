"""Reads a YAML file, its bases and overrides into a pydantic model: a configuration, a cluster profile, a sweep.

`source` gives every value the line where it was written, pydantic checks types strictly (true is not an integer, "5" is
not a number), and every problem is reported with its line and key, unknown keys with the nearest valid one. A model is
a `Section` whose fields are scalars, lists, mappings and other sections, also lists of sections.

A file may extend another one with `base: other.yaml` (relative to itself; chains are allowed): mappings are merged key
by key, any other value replaces that of the base. Overrides are applied last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Any, Generic, TypeVar, get_args

from pydantic import ValidationError

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.keys import (
    Group,
    child_annotation,
    groups_of,
    is_text,
    keys_of,
    kinds_of,
    nearest_names,
    section_of,
)
from megatron_g2rl.config.sections.base import Section
from megatron_g2rl.config.source import COMMAND_LINE, Entry, read_text, read_value, read_yaml
from megatron_g2rl.config.tree import Config

BASE = "base"
Model = TypeVar("Model", bound=Section)


@dataclass(frozen=True)
class Format(Generic[Model]):
    """A kind of settings file: its model, and how its problems are reported."""

    model: type[Model]
    """Class of the settings."""
    refusal: str
    """Start of the error message, after the file's name: `is not a valid configuration`."""
    shows_values: bool = True
    """Whether messages show invalid values; false if they may be secrets: the key is described instead."""
    hint: Callable[[str, Entry], str | None] = lambda name, entry: None
    """What to do about an unknown key, given its dotted name and its entry; None: nothing special."""
    check: Callable[[Entry], Iterable[str]] = lambda tree: ()
    """Further problems of the merged tree of a file."""


def read_model(form: Format[Model], file: Path, overrides: Sequence[str | Entry] = ()) -> tuple[Model, Entry]:
    """Read a file, its bases and overrides; the settings, and the tree with the origin of every value.

    Args:
        form: the kind of file.
        file: the file.
        overrides: texts such as `algorithm.kl_coefficient=0`, or trees of values from elsewhere.

    Raises:
        ConfigError: a file cannot be read, bases form a cycle, keys are unknown or repeated, values are missing or of
            the wrong type. Problems of all files and overrides are reported together.
    """
    merged = reduce(merge, [*_with_bases(file, ()), *_overrides(overrides, form.model)])
    tree = Entry(merged.value, str(file))
    problems: list[str] = []
    plain = _plain(tree, form.model, problems)
    if problems:
        raise ConfigError.listing(f"{file} {form.refusal}", problems)
    try:
        model = form.model.model_validate_json(json.dumps(plain), strict=True, context=dict(_origins(tree, "")))
    except ValidationError as error:
        report = _Report(form, tree)
        problems = [line for details in error.errors(include_url=False) for line in report.lines(details)]
    problems += form.check(tree)
    if problems:
        raise ConfigError.listing(f"{file} {form.refusal}", list(dict.fromkeys(problems)))
    return model, tree


def read_override(text: str, model: type[Section] = Config) -> Entry:
    """`section.key=value` of the command line as a nested mapping.

    The value of a text key is taken literally, unless it is one quoted YAML string, or null. Values of other keys are
    parsed as YAML.

    Raises:
        ConfigError: the key or the `=` is missing.
    """
    path, equals, written = text.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"{COMMAND_LINE}: {text[:200]!r} is not an override; write section.key=value")
    key = keys_of(model).get(".".join(names))
    entry = read_text(written) if key is not None and key.is_text else read_value(written)
    for name in reversed(names):
        entry = Entry({name: entry}, COMMAND_LINE)
    return entry


def merge(below: Entry, above: Entry) -> Entry:
    """Merge two trees: mappings key by key; any other value of `above` replaces that of `below`."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    both = {name: merge(below.value[name], above.value[name]) for name in above.value if name in below.value}
    return Entry({**below.value, **above.value, **both}, above.origin)


def files_of(path: Path) -> list[Path]:
    """A file and its bases; `read_model` must have read them without an error."""
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
        raise ConfigError(f"{base.origin}: base must be the name of one other file, not {_written(base)}")
    file = path.parent / base.value
    if not file.is_file():
        raise ConfigError(f"{base.origin}: the base {file} does not exist (base is relative to {path.name})")
    return [*_with_bases(file, (*above, path)), entry]


def _overrides(texts: Sequence[str | Entry], model: type[Section]) -> list[Entry]:
    entries, problems = [], []
    for text in texts:
        try:
            entries.append(text if isinstance(text, Entry) else read_override(text, model))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError.listing("overrides cannot be read", problems)
    return entries


def _plain(entry: Entry, annotation: Any, problems: list[str]) -> Any:
    """The value of an entry as JSON; where the type is text, it is the text as written, even if it looks like a number.

    Args:
        entry: the entry.
        annotation: type of the value in the model; None if the model has no such key.
        problems: list to which problems are appended.
    """
    value = entry.value
    if isinstance(value, dict):
        for name in value:
            _check_encoding(name, value[name], problems)
        return {name: _plain(child, child_annotation(annotation, name), problems) for name, child in value.items()}
    if isinstance(value, list):
        return [_plain(child, child_annotation(annotation, 0), problems) for child in value]
    if isinstance(value, str):
        _check_encoding(value, entry, problems)
    elif entry.text is not None and is_text(annotation) and type(value) not in kinds_of(annotation):
        null = value is None and (entry.text or NoneType in get_args(annotation))
        return None if null else entry.text
    return value


def _check_encoding(text: str, entry: Entry, problems: list[str]) -> None:
    """Report text that cannot be encoded: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        problems.append(f"{entry.origin}: contains half of a surrogate pair, which is not a valid string")


def _origins(tree: Entry, prefix: str) -> Iterator[tuple[str, str]]:
    """Dotted names of all values, and where they were written."""
    for name, child in tree.value.items() if isinstance(tree.value, dict) else ():
        yield f"{prefix}{name}", child.origin
        yield from _origins(child, f"{prefix}{name}.")


class _Report:
    """Formats the problems that pydantic found in a tree, one per line."""

    def __init__(self, form: Format, tree: Entry) -> None:
        """Prepare to report problems of a merged tree."""
        self._form, self._tree = form, tree
        self._keys = keys_of(form.model)
        self._groups = {group.name: group for group in groups_of(form.model)}
        self._has_only_sections = len(self._groups) == len(form.model.model_fields)

    def lines(self, details: dict[str, Any]) -> list[str]:
        """The lines about one error of pydantic."""
        kind, location = details["type"], details["loc"]
        entry, names = self._tree.find(location)
        path = ".".join(names)
        origin = entry.origin
        if kind == "missing":
            return self._missing(location, origin)
        if kind == "extra_forbidden":
            return [f"{origin}: {self._unknown(names, entry)}"]
        if kind == "value_error":
            return [f"{origin}: {self._shown(path, entry)} {details['msg'].removeprefix('Value error, ')}"]
        if path in self._groups and not isinstance(entry.value, dict):
            return [f"{origin}: {self._not_a_section(self._groups[path], entry)}"]
        reason = f"; valid: {self._keys[path].allowed}" if path in self._keys else f": {details['msg']}"
        return [f"{origin}: {self._shown(path, entry)} is not allowed{reason}{self._remark(names, entry)}"]

    def _missing(self, location: Sequence[str | int], origin: str) -> list[str]:
        """One line for each required key in a section that is missing, or for one missing key."""
        prefix = ".".join(map(str, location))
        required = [key for key in self._keys.values() if key.required and f"{key.path}.".startswith(f"{prefix}.")]
        if not required:
            return [f"{origin}: {prefix} is missing; it has no default"]
        return [f"{origin}: {key.path} is missing; it has no default. {key.description}" for key in required]

    def _unknown(self, names: tuple[str, ...], entry: Entry) -> str:
        name = ".".join(names)
        if hint := self._form.hint(name, entry):
            return hint
        if isinstance(entry.value, dict) and len(names) == 1 and self._has_only_sections:
            nearest = max(self._groups, key=lambda section: SequenceMatcher(None, name, section).ratio())
            return f"unknown section {_short(name)}. Nearest valid section: {nearest}"
        if name in self._keys:
            section, _, leaf = name.partition(".")
            return f"{name} is command-line syntax; in a file put {leaf}: under {section}:"
        nearest = nearest_names(name[:200], self._known_beside(names))
        return f"unknown key {_short(name)}. Nearest valid key: {' or '.join(nearest)}"

    def _known_beside(self, names: tuple[str, ...]) -> list[str]:
        """The keys that may be meant by an unknown one: all keys of the model; in a list, those of its section."""
        annotation: Any = self._form.model
        for depth, name in enumerate(names[:-1], start=1):
            annotation = child_annotation(annotation, name)
            if name.isdecimal() and (section := section_of(annotation)):
                return [f"{'.'.join(names[:depth])}.{path}" for path in keys_of(section)]
        return [*self._keys, *([] if self._has_only_sections else self._groups)]

    def _not_a_section(self, group: Group, entry: Entry) -> str:
        keys = ", ".join(key.leaf for key in group.keys)
        shown = f" = {_written(entry)}" * self._form.shows_values
        return f"{group.name}{shown} is not allowed; it is a section with the keys {keys}"

    def _remark(self, names: tuple[str, ...], entry: Entry) -> str:
        """What the key means if its value is not shown; else a hint about the value."""
        if self._form.shows_values:
            hint = self._form.hint(".".join(names), entry)
            return f"; {hint}" if hint else ""
        outermost = next((key for key in (".".join(names[:depth]) for depth in (2, 1)) if key in self._keys), None)
        return f". {self._keys[outermost].description}" if outermost else ""

    def _shown(self, path: str, entry: Entry) -> str:
        if not self._form.shows_values:
            return path
        return f"{path} = {_short(repr(entry.text) if isinstance(entry.value, str) else _written(entry))}"


def _written(entry: Entry) -> str:
    if isinstance(entry.value, dict):
        return "{" + ", ".join(f"{name}: ..." for name in entry.value) + "}"
    return _short(entry.text if entry.text else json.dumps(entry.value, default=lambda child: child.value))


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
