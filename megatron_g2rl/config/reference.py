"""Generates docs/configuration.md from the tree: `python -m megatron_g2rl.config.reference > docs/configuration.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import PurePath

from megatron_g2rl.config.keys import Group, Key, config_groups, config_keys, keys_of
from megatron_g2rl.config.warm_start import WarmStart

INTRODUCTION = """\
# Configuration

Generated from `megatron_g2rl/config/sections/` by `make docs`; edit those files, not this page.

A run is described by one YAML file: sections with keys, {count} keys in all. A key that the file omits has the default
below. `base: other.yaml` at the top of a file extends another file (relative to this one; it may have a base itself):
sections are merged key by key, any other value replaces that of the base. Command-line overrides are applied last:

    g2rl train run.yaml trainer.steps=10 algorithm.kl_coefficient=0 --dry-run

`--dry-run` prints the resolved configuration and the batch ledger of a step, then exits. Unknown keys, wrong types and
inconsistent values are errors that name the key, the line and the fix; so are keys that have been renamed
(`CHANGELOG.md`). Values are YAML 1.2: `5e-7` is a number, and `true` and `false` are the only booleans.
On the command line, text is taken literally, except that quotes around a string are removed and `null` means null.
Relative paths start at the working directory.
"""


WARM_START = """\
`g2rl warm-start FILE` creates a model before any run. Its file has the keys below, and the sections `policy` and
`model` as above: `model` is the model to start from (null: a small, randomly initialized Qwen3 with a tokenizer for the
task). If `output` already holds the result of the same settings, nothing is done; any other content is refused.
"""


def configuration_page() -> str:
    """The Markdown page of all sections and keys."""
    introduction = INTRODUCTION.format(count=len(config_keys()))
    sections = (_section(group.name, _described(group), group.keys) for group in config_groups())
    own_keys = [key for key in keys_of(WarmStart).values() if "." not in key.path]
    return "\n".join([introduction, *sections, _section("A warm start", WARM_START.rstrip(), own_keys)])


def _described(group: Group) -> str:
    return group.description + (" May be omitted or null." if group.optional else "")


def _section(name: str, description: str, keys: Iterable[Key]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|", *map(_row, keys)]
    return "\n".join([f"## {name}", "", description, "", *rows, ""])


def _row(key: Key) -> str:
    default = "required" if key.required else f"`{_shown(key.default)}`"
    allowed = f"`{key.allowed}`" if "matching" in key.allowed else key.allowed
    return f"| `{key.leaf}` | {_cell(allowed)} | {_cell(default)} | {_cell(key.description)} |"


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
