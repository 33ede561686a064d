"""Reads the files of a run folder: metrics.jsonl, config.yaml and, if present, evaluation.jsonl and responses.jsonl.

Files of older versions (with the old names of metrics and keys) and of active runs are read as far as possible:
unreadable lines are counted, never guessed.
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

from megatron_g2rl.config.renamed import current_key, current_metric
from megatron_g2rl.errors import UserError

EVALUATION = "evaluation/"
"""Prefix of the metrics of the evaluation set."""


@dataclass(frozen=True)
class Run:
    """One run, as read from its folder."""

    label: str
    """Unique name in the report."""
    folder: Path
    metrics: dict[int, dict[str, float]]
    """Finite numbers by step and metric name, ordered by step; `step` counts the training steps behind the weights."""
    evaluations: dict[int, dict[str, float]]
    """The same for evaluation.jsonl: `evaluation/*` by the number of steps behind the weights."""
    settings: dict[str, Any]
    """config.yaml by dotted key; empty if it is missing or unreadable."""
    responses: list[dict[str, Any]]
    """Objects of responses.jsonl; empty if there are none."""
    broken_lines: int
    """Number of lines that are not JSON objects: usually the last line of a run that was killed."""

    @property
    def steps(self) -> list[int]:
        """The finished steps."""
        return list(self.metrics)

    def names(self) -> set[str]:
        """Metrics with at least one value."""
        rows = [*self.metrics.values(), *self.evaluations.values()]
        return {name for values in rows for name in values}

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, NaN for steps without one; for evaluation metrics only the evaluated steps."""
        if name.startswith(EVALUATION):
            rows = [*self.metrics.items(), *self.evaluations.items()]
            present = {step: values[name] for step, values in rows if name in values}
            return sorted(present), [present[step] for step in sorted(present)]
        return self.steps, [values.get(name, math.nan) for values in self.metrics.values()]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each with a unique label.

    Raises:
        UserError: a folder has no metrics.jsonl or no finished step.
    """
    return [_read_run(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def _read_run(folder: Path, label: str) -> Run:
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{folder}: there is no metrics.jsonl; name the folder of a run (run.directory/run.name)")
    metrics, broken = _by_step(file)
    if not metrics:
        raise UserError(f"{file}: contains no step yet; wait until the run has finished its first one")
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
    """The numbers of a file by step, and its number of broken lines; later lines of a step override earlier ones."""
    lines, broken = _json_lines(file)
    by_step: dict[int, dict[str, float]] = {}
    for line in lines:
        step = line.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            broken += 1
        else:
            by_step.setdefault(step, {}).update(_numbers(line))
    return dict(sorted(by_step.items())), broken


def _json_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON Lines file, and the number of lines that are not objects."""
    if not file.is_file():
        return [], 0
    objects, broken = [], 0
    # Only \n ends a line: a response may contain other characters at which splitlines() would split.
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
    """Whether a value read from JSON is a number that can be plotted."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {current_metric(name): float(value) for name, value in line.items() if name != "step" and finite(value)}


def _settings(file: Path) -> dict[str, Any]:
    if not file.is_file():  # reading a pipe would block
        return {}
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return flat_settings(tree) if isinstance(tree, dict) else {}


def flat_settings(tree: dict[Any, Any]) -> dict[str, Any]:
    """A configuration by dotted key, with the current names of keys."""
    return {current_key(key): value for key, value in _flat(tree, ())}


def _flat(tree: dict[Any, Any], above: tuple[str, ...]) -> list[tuple[str, Any]]:
    settings: list[tuple[str, Any]] = []
    for name, value in tree.items():
        path = (*above, str(name))
        settings += _flat(value, path) if isinstance(value, dict) else [(".".join(path), value)]
    return settings


def short_labels(labels: Sequence[str]) -> list[str]:
    """The labels without their common leading words: quickstart_grpo and quickstart_g2rl become grpo and g2rl."""
    shared = re.match(r"(.*[-_/. ])?", commonprefix(list(labels)), re.DOTALL).end() if len(labels) > 1 else 0
    return [label[shared:] or label for label in labels]


def _labels(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parent folders as needed to make them unique, else numbered."""
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
