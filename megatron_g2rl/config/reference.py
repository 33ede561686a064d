"""Writes docs/configuration.md from the tree: `python -m megatron_g2rl.config.reference > docs/configuration.md`."""

from __future__ import annotations

import sys
from pathlib import PurePath

from megatron_g2rl.config.keys import Group, Key, config_groups, config_keys

INTRODUCTION = """\
# Configuration

Made from `megatron_g2rl/config/tree.py` by `make docs`; edit that file, not this page.

A run is described by one YAML file: sections with keys, {count} keys in all. What a file leaves out has the default
below. `base: other.yaml` at the top of a file starts from another file (relative to this one, and that one may have a
base itself): sections are merged key by key, any other value replaces. The command line has the last word:

    g2rl train run.yaml trainer.steps=10 algorithm.kl_coefficient=0 --dry-run

`--dry-run` prints the resolved configuration and what a step consists of, and starts nothing. Unknown keys, wrong types
and values that do not fit together are errors that name the key, the line and the remedy. Values are YAML 1.2: `5e-7`
is a number, `true` and `false` are the only switches.
On the command line text is taken as it stands, but for a string in quotes, which loses them, and `null`. Relative paths
start at the working directory.
"""


def configuration_page() -> str:
    """The Markdown page of all sections and keys."""
    sections = [INTRODUCTION.format(count=len(config_keys())), *map(_section, config_groups())]
    return "\n".join(sections)


def _section(group: Group) -> str:
    optional = " May be left out or null." if group.optional else ""
    rows = ["| key | takes | default | what it is |", "|---|---|---|---|", *map(_row, group.keys)]
    return "\n".join([f"## {group.name}", "", group.description + optional, "", *rows, ""])


def _row(key: Key) -> str:
    default = "required" if key.required else f"`{_shown(key.default)}`"
    takes = f"`{key.allowed}`" if "matching" in key.allowed else key.allowed
    return f"| `{key.leaf}` | {_cell(takes)} | {_cell(default)} | {_cell(key.description)} |"


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, PurePath)):
        return str(value).replace("\n", "\\n") or '""'
    if isinstance(value, tuple):
        return str(list(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.stdout.write(configuration_page())
