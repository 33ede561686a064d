"""Run folders: the files that a run writes for users and for resuming; read by `report`, `train`, `status`, `logs`."""

from __future__ import annotations

import json
import shutil

import yaml

from tools.fuzz.case import Work, yaml_bytes
from tools.fuzz.seeds import RUN_OVERRIDES
from tools.fuzz.values import change_bytes, change_tree

LINES = ("metrics.jsonl", "metrics.jsonl", "evaluation.jsonl", "responses.jsonl")
OTHERS = ("config.yaml", "run.lock", "rollouts", "tensorboard")
TREES = ("status.json", "checkpoints/best.json")


def make(work: Work) -> None:
    """`report` on a changed run folder, resuming it, or `status` and `logs` of a launched run."""
    work.copy("config.yaml", "problems.jsonl", "test.jsonl", "model", "runs/run")
    kind = work.random.random()
    run = "runs/run"
    if kind < 0.55:
        work.arguments = ["report", run, *([run] if work.random.random() < 0.2 else [])]
    elif kind < 0.85:
        work.arguments = ["train", "config.yaml", *RUN_OVERRIDES, "trainer.steps=3"]
        if work.random.random() < 0.5:
            shutil.rmtree(work.folder / run / "checkpoints/step_00000002")
    else:
        _launched(work, run)
        return
    for random in work.changes():
        kind = random.random()
        name = random.choice(LINES) if kind < 0.65 else random.choice(TREES)
        path = work.folder / run / name
        if kind > 0.92 or not path.is_file() or path.is_symlink():
            work.replace_file(f"{run}/{random.choice((*LINES, *TREES, *OTHERS))}", random)
        elif kind < 0.65:
            work.change_json_lines(f"{run}/{name}", random)
        elif kind < 0.82:
            work.change_json(f"{run}/{name}", random)
        else:
            work.change_file(f"{run}/config.yaml", random, yaml.safe_load, lambda tree, r=random: yaml_bytes(tree, r))


def _launched(work: Work, run: str) -> None:
    """A launched run: its registry entry, and the files of its attempts."""
    registry = work.folder.parent / "home" / "state" / "g2rl" / "launched"
    registry.mkdir(parents=True, exist_ok=True)
    launch = work.folder / run / "launch"
    launch.mkdir()
    name = work.random.choice(("attempts", "jobs", "outcome", "reason", "log-7-0.out", "cut_off", "cancelled"))
    for file in ("jobs", "attempts", "outcome", "log-7-0.out"):
        (launch / file).write_text("7\n")
    entry = {"run_folder": str(work.folder / run), "tunnel": {"kind": "local"}, "jobs": ["7"],
             "earlier": ""}  # fmt: skip
    work.arguments = work.random.choice((["status"], ["status", "run"], ["logs", "run"], ["status", run]))
    for random in work.changes():
        kind = random.random()
        if kind < 0.5:
            entry = change_tree(entry, random)
        elif kind < 0.75:
            work.change_json(f"{run}/status.json", random)
        else:
            path = launch / name
            path.write_bytes(change_bytes(path.read_bytes() if path.is_file() else b"7 0 1 0\n", random))
    (registry / "run.json").write_text(json.dumps(entry))
