"""Overrides on the command line: keys of the configuration with valid and hostile values, and malformed overrides."""

from __future__ import annotations

from random import Random

from tools.fuzz.case import Work, as_argument, bounding
from tools.fuzz.targets.configurations import USUAL, all_keys, allowed_value, import_nothing
from tools.fuzz.values import change_text, hostile, json_text

YAML_TEXTS = ("", "null", "~", "[1,2]", "{a: b}", "&a b", "*a", "!!int 3", "'", '"x', "'a' b", "a: b", "# x", "1 # x",
              "[" * 3000, "{a: " * 3000, "-" * 9, "|", ">", "@x", "%x", "`x`", "? x", "- " * 12 + "x",
              "!<tag:yaml.org,2002:python/object:os.system> x")  # fmt: skip


def make(work: Work) -> None:
    """`train`, mostly with `--dry-run`, with a few overrides."""
    work.copy(*USUAL, "config.yaml")
    kind = work.random.random()
    work.arguments = ["doctor" if kind < 0.05 else "train", "config.yaml"]
    work.before = import_nothing if kind < 0.05 else None
    for random in work.changes(5):
        work.arguments.append(as_argument(_override(random)))
    if kind >= 0.05:
        work.arguments += ["--dry-run"] if kind < 0.75 else bounding()


def _override(random: Random) -> str:
    path, key = random.choice(sorted(all_keys().items()))
    kind = random.random()
    if kind < 0.35:
        value = allowed_value(key, random)
        text = str(value).lower() if isinstance(value, bool) else str(value)
    elif kind < 0.75:
        value = hostile(random)
        text = value if isinstance(value, str) else json_text(value)
    else:
        text = random.choice(YAML_TEXTS)
    if random.random() < 0.1:
        path = random.choice((change_text(path, random), path.partition(".")[0], path + ".x", "base", "", "."))
    return f"{path}={text}" if random.random() < 0.97 else path + text
