"""Rollout journals: changed lines with a valid checksum, and lines without one."""

from __future__ import annotations

import json
import shutil
from typing import Any

import xxhash

from tools.fuzz.case import Work
from tools.fuzz.seeds import RUN_OVERRIDES

JOURNAL = "runs/run/rollouts"


def make(work: Work) -> None:
    """Resume a run whose second step reads its responses from a changed journal."""
    work.copy("config.yaml", "problems.jsonl", "test.jsonl", "model", "runs/run")
    shutil.rmtree(work.folder / "runs/run/checkpoints/step_00000002")
    work.arguments = ["train", "config.yaml", *RUN_OVERRIDES]
    files = sorted(file.name for file in (work.folder / JOURNAL).glob("*00001.rank*"))
    for random in work.changes():
        file = random.choice(files)
        if random.random() < 0.05:
            work.replace_file(f"{JOURNAL}/{file}", random)
        elif (work.folder / JOURNAL / file).is_file() and not (work.folder / JOURNAL / file).is_symlink():
            work.change_json_lines(f"{JOURNAL}/{file}", random, seal=_seal)


def _seal(record: Any) -> bytes:
    """A line with an updated checksum, as `JournaledRollout` writes it."""
    if not isinstance(record, dict):
        return json.dumps(record).encode() + b"\n"
    body = json.dumps({name: value for name, value in record.items() if name != "xxh3"})[:-1].encode()
    return body + b', "xxh3": "' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}\n'
