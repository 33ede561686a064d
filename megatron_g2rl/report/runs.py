"""Reads what a run left in its folder: metrics.jsonl, config.yaml and, where there are any, evaluation.jsonl and
responses.jsonl.

Files of older versions and of runs that are still going on are read as far as they go: what cannot be read is counted,
never guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

import yaml

from megatron_g2rl.errors import UserError

MOST_RUNS = 8
"""Runs that eight colours can tell apart."""
EVALUATION = "evaluation/"
"""Beginning of the names of what is measured on held-out problems."""


@dataclass(frozen=True)
class Run:
    """One run as it lies on the disk."""

    label: str
    """Name in the report, unlike that of any other run in it."""
    folder: Path
    metrics: dict[int, dict[str, float]]
    """Finite numbers by step and metric name, in the order of the steps; a step counts those behind its weights."""
    evaluations: dict[int, dict[str, float]]
    """The same of evaluation.jsonl: `evaluation/*` by the number of steps behind the weights."""
    settings: dict[str, Any]
    """config.yaml by dotted key; empty when it is missing or cannot be read."""
    responses: list[dict[str, Any]]
    """Lines of responses.jsonl; empty when there are none."""
    broken_lines: int
    """Lines that are no JSON objects: usually the last one of a run that was killed."""

    @property
    def steps(self) -> list[int]:
        """The steps that were finished."""
        return list(self.metrics)

    def names(self) -> set[str]:
        """Metrics with at least one number."""
        rows = [*self.metrics.values(), *self.evaluations.values()]
        return {name for values in rows for name in values}

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, NaN where a step has no number; of evaluations only the steps that made one."""
        if name.startswith(EVALUATION):
            rows = [*self.metrics.items(), *self.evaluations.items()]
            found = {step: values[name] for step, values in rows if name in values}
            return sorted(found), [found[step] for step in sorted(found)]
        return self.steps, [values.get(name, math.nan) for values in self.metrics.values()]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each with a label of its own.

    Raises:
        UserError: a folder holds no metrics.jsonl or not one finished step, or there are more than eight.
    """
    if len(folders) > MOST_RUNS:
        raise UserError(f"a report shows at most {MOST_RUNS} runs, these are {len(folders)}: make several reports")
    return [_read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def _read_run(folder: Path, label: str) -> Run:
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{folder}: there is no metrics.jsonl here; name the folder of a run (run.directory/run.name)")
    metrics, broken = _by_step(file)
    if not metrics:
        raise UserError(f"{file}: no step is in it yet; wait until the run has finished its first one")
    evaluations, broken_evaluations = _by_step(folder / "evaluation.jsonl")
    responses, broken_responses = _json_lines(folder / "responses.jsonl")
    return Run(
        label=label,
        folder=folder,
        metrics=metrics,
        evaluations={
            step: {name: value for name, value in values.items() if name.startswith(EVALUATION)}
            for step, values in evaluations.items()
        },
        settings=_settings(folder / "config.yaml"),
        responses=responses,
        broken_lines=broken + broken_evaluations + broken_responses,
    )


def _by_step(file: Path) -> tuple[dict[int, dict[str, float]], int]:
    """The numbers of a file by step, and its broken lines; of lines of one step the later ones win."""
    lines, broken = _json_lines(file)
    found: dict[int, dict[str, float]] = {}
    for line in lines:
        step = line.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            broken += 1
        else:
            found.setdefault(step, {}).update(_numbers(line))
    return dict(sorted(found.items())), broken


def _json_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a file, one a line, and the number of lines that hold none."""
    if not file.is_file():
        return [], 0
    objects, broken = [], 0
    # Lines end with \n alone: a response may hold other characters that splitlines() takes for ends.
    for text in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            broken += 1
    return objects, broken


def finite(value: Any) -> bool:
    """Whether a value read from JSON is a number that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in line.items() if name != "step" and finite(value)}


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():  # a pipe would be waited for
        return {}
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return dict(_flat(tree, ())) if isinstance(tree, dict) else {}


def _flat(tree: dict[Any, Any], above: tuple[str, ...]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        path = (*above, str(name))
        found += _flat(value, path) if isinstance(value, dict) else [(".".join(path), value)]
    return found


def short_labels(labels: Sequence[str]) -> list[str]:
    """The labels without the words that all begin with: quickstart_grpo and quickstart_g2rl as grpo and g2rl."""
    shared = re.match(r"(.*[-_/. ])?", commonprefix(list(labels)), re.DOTALL).end() if len(labels) > 1 else 0
    return [label[shared:] or label for label in labels]


def _labels(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with as many folders above as it takes to tell them apart, else numbered."""
    parts = [folder.resolve().parts for folder in folders]
    labels = ["/".join(path[-1:]) or "run" for path in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        if len(set(labels)) == len(labels):
            break
        repeated = {label for label in labels if labels.count(label) > 1}
        labels = ["/".join(p[-depth:]) if old in repeated else old for p, old in zip(parts, labels, strict=True)]
    return [
        f"{label} ({labels[:i].count(label) + 1})" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]
