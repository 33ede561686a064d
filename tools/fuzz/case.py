"""One case: a folder of files and a command, both changed as a seed determines."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tools.fuzz.seeds import BOUNDS, Seeds
from tools.fuzz.values import change_bytes, change_tree


class Work:
    """A case under construction. A target copies valid files into `folder`, changes them and sets the command."""

    def __init__(self, folder: Path, seeds: Seeds, name: str, kept: frozenset[int] | None = None):
        """Start with an empty `folder`.

        Args:
            folder: working folder of the command.
            seeds: valid files.
            name: seed of everything random.
            kept: indices of the changes to make; None: all.
        """
        self.folder, self.seeds, self.name, self.kept = folder, seeds, name, kept
        self.random = Random(name)
        self.arguments: list[str] = []
        self.environment: dict[str, str | None] = {}
        self.before: Callable[[], object] | None = None
        """Called in the command's process before the command."""
        self.number_of_changes = 0
        folder.mkdir(parents=True)

    def copy(self, *names: str) -> None:
        """Copy files and folders of the seeds."""
        for name in names:
            source, target = self.seeds.work / name, self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)

    def changes(self, most: int = 3) -> Iterator[Random]:
        """A random generator for each of a few changes; skips those not in `kept` (used to reduce a failing case)."""
        for _ in range(self.random.choice((1, 1, 1, 2, most))):
            number = self.number_of_changes
            self.number_of_changes += 1
            if self.kept is None or number in self.kept:
                yield Random(f"{self.name}/{number}")

    def change_file(self, name: str, random: Random, read: Callable[[bytes], Any], write: Callable[[Any], bytes]):
        """Change the tree in a file, or its bytes if it can no longer be parsed."""
        file = self.folder / name
        if not self.is_regular(name):
            return
        data = file.read_bytes()
        if random.random() < 0.12:
            file.write_bytes(change_bytes(data, random))
            return
        try:
            tree = read(data)
        except (ValueError, yaml.YAMLError, RecursionError):
            file.write_bytes(change_bytes(data, random))
        else:
            file.write_bytes(write(change_tree(tree, random)))

    def change_json(self, name: str, random: Random) -> None:
        """Change a JSON file."""
        self.change_file(name, random, json.loads, lambda tree: json.dumps(tree).encode())

    def change_json_lines(self, name: str, random: Random, seal: Callable[[Any], bytes] | None = None) -> None:
        """Change a line of a JSON lines file, or the order of its lines.

        Args:
            name: name of the file.
            random: determines the change.
            seal: converts a value to a line; default: JSON.
        """
        file = self.folder / name
        if not self.is_regular(name):
            return
        lines = file.read_bytes().splitlines(keepends=True) or [b"{}\n"]
        at, kind = random.randrange(len(lines)), random.random()
        if kind < 0.1:
            lines[at] = change_bytes(lines[at], random)
        elif kind < 0.15:
            random.shuffle(lines)
        elif kind < 0.2:
            lines[at] *= random.choice((0, 2, 3))
        else:
            try:
                tree = change_tree(json.loads(lines[at]), random)
                lines[at] = seal(tree) if seal else json.dumps(tree).encode() + b"\n"
            except (ValueError, RecursionError):
                lines[at] = change_bytes(lines[at], random)
        file.write_bytes(b"".join(lines))

    def is_regular(self, name: str) -> bool:
        """Whether a file can still be changed; False if an earlier change replaced it by a pipe or a device."""
        file = self.folder / name
        return file.is_file() and not file.is_symlink()

    def replace_file(self, name: str, random: Random) -> None:
        """Replace a file by nothing, an empty file, a folder, a pipe, or a link to a device or to nowhere."""
        path = self.folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = random.randrange(6)
        if kind == 0:
            path.mkdir()
        elif kind == 1:
            os.mkfifo(path)
        elif kind == 2:
            path.symlink_to(random.choice(("/dev/null", "/dev/zero", "/dev/full", "nowhere", path.name)))
        elif kind == 3:
            path.touch()


def clamp(tree: Any) -> Any:
    """The configuration with every key of `BOUNDS` limited, so that a run takes no longer than the seed's."""
    if not isinstance(tree, dict):
        return tree
    tree = dict(tree)
    for key, value in BOUNDS.items():
        section, _, leaf = key.partition(".")
        values = tree.get(section)
        if isinstance(values, dict) and leaf in values and _is_larger(values[leaf], value):
            tree[section] = values | {leaf: value}
    return tree


def _is_larger(value: Any, bound: Any) -> bool:
    if isinstance(bound, str):
        return value != bound
    if isinstance(value, str):
        return True
    return isinstance(value, int | float) and value > bound


def bounding() -> list[str]:
    """Overrides that have the same effect as `clamp`."""
    return [f"{key}={value}" for key, value in BOUNDS.items()]


def as_argument(text: str) -> str:
    """Text that a shell can pass: no zero byte, and invalid UTF-8 only as Python's surrogate escapes."""
    return "".join(c for c in text if c and ord(c) and not (0xD800 <= ord(c) < 0xDC80 or 0xDD00 <= ord(c) < 0xE000))


def yaml_bytes(tree: Any, random: Random) -> bytes:
    """A tree as YAML, in block or flow style."""
    if random.random() < 0.5:
        try:
            return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")
        except (yaml.YAMLError, RecursionError):
            pass
    return json.dumps(tree).encode()


YAML_TRICKS: Sequence[Callable[[str, Random], str]] = (
    lambda text, random: text + "\n---\na: b\n",
    lambda text, random: text + "\n? [a, b]\n: c\n",
    lambda text, random: text + "\n!!python/object/apply:os.getcwd []\n",
    lambda text, random: "%YAML 9.9\n---\n" + text,
    lambda text, random: "\ufeff" + text,
    lambda text, random: text.replace("\n", "\r\n"),
    lambda text, random: text.replace(": ", ":\t", 1),
    lambda text, random: text.replace(": ", ": !!python/name:os.system ", 1),
    lambda text, random: text.replace(": ", ": &a ", 1) + "\nzz: *a\n",
    lambda text, random: text + "\nzz: *missing\n",
    lambda text, random: text + "\nzz: &z [*z]\n",
    lambda text, random: text + "\n<<: {a: b}\n",
    lambda text, random: text + "\nb0: &b0 [x]\n"
    + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, random.choice((3, 10)))),
    lambda text, random: text + "\nzz: " + "[" * random.choice((20, 1000, 20_000)) + "\n",
    lambda text, random: text + "\nzz: " + "{a: " * random.choice((20, 1000, 20_000)) + "\n",
    lambda text, random: text + "\n" + text,
    lambda text, random: text + "\nzz: |\n  a\n b\n",
    lambda text, random: text + "\nzz: " + "9" * random.choice((50, 5000)) + "\n",
    lambda text, random: text + "\nzz: 2024-01-01\n",
    lambda text, random: text + "\nzz: 1:2:3\n",
    lambda text, random: text + "\n" + "x" * random.choice((100, 2000)) + ": 1\n",
    lambda text, random: "- " + text,
    lambda text, random: text + "\x00",
    lambda text, random: text[: random.randrange(len(text) + 1)],
)  # fmt: skip


def change_yaml(work: Work, name: str, tree: Any, *, bounded: bool = False) -> None:
    """Write a changed tree as YAML, sometimes with tricks specific to YAML.

    Args:
        work: the case.
        name: name of the file.
        tree: a valid tree.
        bounded: whether a run follows, whose length has to be limited.
    """
    tricks = []
    for random in work.changes():
        if random.random() < 0.15:
            tricks.append((random.choice(YAML_TRICKS), random))
        else:
            tree = change_tree(tree, random)
    if bounded:
        tree = clamp(tree)
    data = yaml_bytes(tree, Random(work.name))
    for trick, random in tricks:
        data = trick(data.decode("utf-8", "surrogatepass"), random).encode("utf-8", "surrogatepass")
    (work.folder / name).write_bytes(data)
