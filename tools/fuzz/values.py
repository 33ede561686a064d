"""Hostile values, and changes to JSON and YAML trees that keep most of them parseable."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

NUMBERS = (0, 1, -1, 2, 3, 7, -(2**31), 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**64), 10**19, 10**40, 0.0, -0.0,
           0.5, 1.5, 1e-300, 5e-324, 1e300, -1e300, 1e308, float("nan"), float("inf"), float("-inf"))  # fmt: skip
TEXTS = ("", " ", "\n", "\t", "\0", "a\0b", "x", "null", "true", "no", "1", "-1", "1e9", "nan", "inf", "0x10", "1_000",
         "\u202e", "\ufeff", "\ud800", "a\udfffb", "\U0001f600", "e\u0301", "\u0130", "\x1b[31m", "\x7f", "\x85",
         "\u2028", "..", "../outside", "/proc/none", "/dev/null", "~nosuchuser/x", "./.", "a/b", "a/b/c", "-", "--help",
         "-x", "*", "%", "%s", "{", "}", "{0}", "{problem}", "{{", "{% for", "${HOME}", "$(true)", "`true`", "'", '"',
         "\\", "#", ": ", "[", "[]", "{}", "&a", "*a", "!!x y", "[bold]", "[/]", "[link=x]y", "&<>", "]]>", "\\boxed{",
         "model", "builtin:tiny", "builtin:arithmetic", "builtin:", "a:b", ":", "a.b", "torch", "float32",
         "x" * 300, "ä" * 200, "x" * 5_000, "9" * 50, "9" * 5_000, "x" * 70_000)  # fmt: skip
SCALARS: tuple[Any, ...] = (None, True, False)
Path = tuple[Any, ...]
"""Keys and indices from the root."""


def hostile(random: Random, depth: int = 2) -> Any:
    """A value of any type."""
    kind = random.random()
    if kind < 0.35:
        return random.choice(NUMBERS)
    if kind < 0.75:
        return random.choice(TEXTS)
    if kind < 0.85 or depth == 0:
        return random.choice(SCALARS)
    if kind < 0.92:
        return [hostile(random, depth - 1) for _ in range(random.choice((0, 1, 2, 5)))]
    return {str(random.choice(TEXTS)): hostile(random, depth - 1) for _ in range(random.choice((0, 1, 2)))}


def nested(depth: int, *, mapping: bool = False) -> Any:
    """Lists, or mappings, nested `depth` times."""
    value: Any = 0
    for _ in range(depth):
        value = {"a": value} if mapping else [value]
    return value


def change_text(text: str, random: Random) -> str:
    """A text similar to `text`."""
    at = random.randrange(len(text) + 1)
    piece = random.choice(TEXTS)
    return random.choice(
        (piece, text[:at], text[at:], text[:at] + piece + text[at:], text + piece, piece + text, text * 3)
    )


def change_value(value: Any, random: Random) -> Any:
    """A replacement for a value, mostly of the same type, so that it passes the first checks."""
    if random.random() < 0.35:
        return hostile(random)
    if isinstance(value, bool):
        return random.choice((not value, int(value), str(value).lower(), None))
    if isinstance(value, int | float):
        near = (value + 1, value - 1, -value, value * 2, value * 1000, value + 0.5, str(value))
        return random.choice((*near, *NUMBERS))
    if isinstance(value, str):
        return change_text(value, random)
    if isinstance(value, list):
        return _change_list(value, random)
    if isinstance(value, dict):
        return _change_mapping(value, random)
    return hostile(random)


def _change_list(value: list, random: Random) -> Any:
    changed = list(value)
    kind = random.randrange(6)
    if kind == 0 or not changed:
        changed.insert(random.randrange(len(changed) + 1), hostile(random))
    elif kind == 1:
        changed.pop(random.randrange(len(changed)))
    elif kind == 2:
        changed = changed * random.choice((2, 3, 50))
    elif kind == 3:
        random.shuffle(changed)
    elif kind == 4:
        return changed[0]
    else:
        return dict(enumerate_keys(changed))
    return changed


def enumerate_keys(values: list) -> Iterator[tuple[str, Any]]:
    """The items of a mapping from index to value."""
    return ((str(index), value) for index, value in enumerate(values))


def _change_mapping(value: dict, random: Random) -> Any:
    changed = dict(value)
    kind = random.randrange(6)
    names = list(changed)
    if kind == 0 or not names:
        changed[str(random.choice(TEXTS))] = hostile(random)
    elif kind == 1:
        del changed[random.choice(names)]
    elif kind == 2:  # rename a key
        name = random.choice(names)
        changed[change_text(str(name), random)] = changed.pop(name)
    elif kind == 3:  # swap two values
        one, other = random.choice(names), random.choice(names)
        changed[one], changed[other] = changed[other], changed[one]
    elif kind == 4:
        return list(changed.values())
    else:
        return list(changed.items())
    return changed


def paths(tree: Any, parent: Path = ()) -> Iterator[Path]:
    """The paths of all values of a tree, the root's first."""
    yield parent
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, child in children:
        yield from paths(child, (*parent, name))


def value_at(tree: Any, path: Path) -> Any:
    """The value at a path."""
    for name in path:
        tree = tree[name]
    return tree


def replaced(tree: Any, path: Path, value: Any) -> Any:
    """A copy of the tree with another value at a path."""
    if not path:
        return value
    tree = copy.copy(tree)
    tree[path[0]] = replaced(tree[path[0]], path[1:], value)
    return tree


def change_tree(tree: Any, random: Random) -> Any:
    """The tree with one change somewhere, rarely at its root."""
    all_paths = list(paths(tree))
    path = random.choice(all_paths[1:]) if len(all_paths) > 1 and random.random() < 0.95 else ()
    value = value_at(tree, path)
    if random.random() < 0.05:
        value = nested(random.choice((3, 10, 60, 400)), mapping=random.random() < 0.5)
    elif random.random() < 0.08:
        value = value_at(tree, random.choice(all_paths))  # the value of another key
    else:
        value = change_value(value, random)
    return replaced(tree, path, value)


def json_text(tree: Any, **options: Any) -> str:
    """The tree as JSON; surrogates are escaped, NaN and Infinity written as Python does."""
    return json.dumps(tree, **options)


def change_bytes(data: bytes, random: Random) -> bytes:
    """Byte noise: truncated, deleted, overwritten, inserted or repeated bytes."""
    at = random.randrange(len(data) + 1)
    end = min(len(data), at + random.choice((1, 2, 8, 64, 512)))
    noise = bytes(random.randrange(256) for _ in range(random.choice((1, 2, 4, 16))))
    inserted = random.choice(
        (noise, b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r\n", b'"', b"{", b"[" * 2000, b"-" * 3)
    )
    return random.choice(
        (
            data[:at],
            data[:at] + data[end:],
            data[:at] + inserted + data[at:],
            data[:at] + data[at:end] * 2 + data[end:],
            data[:at] + noise + data[at + len(noise) :],
            b"",
        )
    )
