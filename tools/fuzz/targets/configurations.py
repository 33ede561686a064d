"""Configurations: every key, with values of the correct type and of other types, and YAML tricks."""

from __future__ import annotations

import json
from random import Random

from tools.fuzz.case import Work, bounding, change_yaml
from tools.fuzz.seeds import CONFIG
from tools.fuzz.values import change_text, change_value

USUAL = ("problems.jsonl", "test.jsonl", "model")


def make(work: Work) -> None:
    """`train --dry-run`, `train` or `doctor` of a changed configuration; sometimes the file is replaced altogether."""
    work.copy(*USUAL)
    kind = work.random.random()
    tree = valid_tree(work.random)
    base = work.random.random() < 0.1
    if kind < 0.65:
        work.arguments = ["train", "config.yaml", "--dry-run"]
    elif kind < 0.92:
        work.arguments = ["train", "config.yaml", *bounding()] if base else ["train", "config.yaml"]
    else:
        work.arguments, work.before = ["doctor", "config.yaml"], import_nothing
    if base:
        tree["base"] = "base.yaml"
        (work.folder / "base.yaml").write_text(json.dumps(CONFIG))
    change_yaml(work, "config.yaml", tree, bounded=work.arguments[0] == "train" and "--dry-run" not in work.arguments)
    if work.random.random() < 0.03:
        for random in work.changes(1):
            work.replace_file("config.yaml", random)


def import_nothing() -> None:
    """Let `g2rl doctor` report every package as working without importing it, which takes half a minute."""
    from megatron_g2rl.commands import doctor

    names = [package.distributions[0] for package in doctor.PACKAGES]
    doctor.packages = lambda: [doctor.Finding(name, "1.0") for name in names]


def valid_tree(random: Random) -> dict:
    """The seed's tree with some further keys; most values are valid on their own."""
    tree = {name: dict(section) for name, section in CONFIG.items()}
    for path, key in random.sample(sorted(all_keys().items()), k=random.choice((0, 2, 5))):
        section, _, leaf = path.partition(".")
        if leaf not in tree.get(section, {}) and key.default is not None and section not in ("base",):
            default = key.default if isinstance(key.default, bool | int | float | str) else str(key.default)
            tree.setdefault(section, {})[leaf] = allowed_value(key, random) if random.random() < 0.2 else default
    return tree


def all_keys() -> dict:
    """Keys of the configuration by path."""
    from megatron_g2rl.config.keys import config_keys

    return config_keys()


def allowed_value(key, random: Random):
    """A value of a key's type: its default, one of its choices, or a similar value."""
    default = None if key.required else key.default
    default = (
        default if isinstance(default, bool | int | float | str) else str(default) if default is not None else None
    )
    if key.allowed.startswith("one of "):
        return random.choice(key.allowed.removeprefix("one of ").removesuffix(" or null").partition(";")[0].split(", "))
    if bool in key.scalars:
        return random.random() < 0.5
    if isinstance(default, int | float) and random.random() < 0.5:
        return random.choice((default, default * 2, default + 1, 1, 0.5 if float in key.scalars else 3))
    if isinstance(default, str) and random.random() < 0.3:
        return change_text(default, random)
    return change_value(default, random) if random.random() < 0.2 else default
