"""Reads the results of `g2rl evaluate`, groups models by the setting of their training, and compares groups."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_g2rl.errors import UserError
from megatron_g2rl.report.groups import (
    SEED,
    Settings,
    find_baseline,
    group_members,
    setting,
    setting_key,
    setting_labels,
)
from megatron_g2rl.report.intervals import Interval, bootstrap_difference, seed_interval
from megatron_g2rl.report.runs import flat_settings

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Result:
    """One model on one benchmark."""

    model: str
    benchmark: str
    metrics: Mapping[str, float]
    """Accuracies by name, such as `pass_at_1`."""
    per_problem: Mapping[str, Mapping[int, float]]
    """Accuracies of each problem, by its id."""
    settings: Settings
    """Configuration of the run that trained the model; empty if no run did."""
    step: int
    """Training steps behind the weights."""


@dataclass(frozen=True)
class ResultGroup:
    """Results of models that were trained with one setting for the same number of steps, each with another seed."""

    label: str
    models: tuple[str, ...]
    settings: Settings
    results: Mapping[tuple[str, str], Result]
    """By seed and benchmark."""

    def with_metric(self, benchmark: str, metric: str) -> dict[str, Result]:
        """The results on a benchmark that have a metric, by seed."""
        return {
            seed: result
            for (seed, name), result in self.results.items()
            if name == benchmark and metric in result.metrics
        }

    def accuracy(self, benchmark: str, metric: str) -> Interval | None:
        """The mean over seeds with its t interval; None without results."""
        values = {seed: result.metrics[metric] for seed, result in self.with_metric(benchmark, metric).items()}
        return seed_interval(values) if values else None


def read_results(folders: Sequence[Path]) -> list[Result]:
    """The results in these folders and below them; models in the order of the folders, then of their names.

    Raises:
        UserError: a folder has none, a summary is corrupt, or one model has two results on a benchmark.
    """
    results: dict[tuple[str, str], Result] = {}
    for folder in folders:
        files = sorted(folder.rglob(SUMMARY)) if folder.is_dir() else []
        if not files:
            raise UserError(f"{folder} has no {SUMMARY}: give folders that g2rl evaluate wrote")
        for file in files:
            result = _read(file)
            if (result.model, result.benchmark) in results:
                raise UserError(f"{file}: there are two results of {result.model} on {result.benchmark}")
            results[result.model, result.benchmark] = result
    return list(results.values())


def _read(file: Path) -> Result:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        names = [name for name in content["metrics"] if "_at_" in name]
        ids = content["problem_ids"]
        values = {name: dict(zip(ids, map(float, content["per_problem"][name]), strict=True)) for name in names}
        metrics = {name: float(content["metrics"][name]) for name in names}
        settings = flat_settings(content.get("training") or {})
        model, benchmark, step = str(content["model"]), str(content["benchmark"]), int(content.get("step", 0))
        return Result(model, benchmark, metrics, values, settings, step)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not the summary of an evaluation: {error!r}") from error


def group_results(results: Sequence[Result]) -> list[ResultGroup]:
    """The groups of the evaluated models, in the order of their first models.

    If every model is a group of its own, groups have the names of their models; else those of their settings.
    """
    models = {result.model: result for result in reversed(results)}
    models = {name: models[name] for name in dict.fromkeys(result.model for result in results)}
    names, first = list(models), list(models.values())
    keys = [key and (key, each.step) for each in first for key in [setting_key(each.settings)]]
    seeds = [setting(each.settings, SEED) for each in first]
    members = group_members(keys, seeds)
    settings = [{**first[group[0]].settings, "step": first[group[0]].step} for group in members]
    settings = [each if len(each) > 1 else {} for each in settings]
    labels = [names[group[0]] for group in members]
    if len(members) < len(models):
        labels = setting_labels(settings, labels)
    return [
        ResultGroup(
            label,
            tuple(names[number] for number in group),
            own,
            {(seeds[names.index(r.model)], r.benchmark): r for r in results if names.index(r.model) in group},
        )
        for label, group, own in zip(labels, members, settings, strict=True)
    ]


def baseline_of(groups: Sequence[ResultGroup], wanted: str | None) -> int:
    """Index of the group with which the others are compared, by its label or by a model; by default GRPO.

    Raises:
        UserError: there is no group of this name.
    """
    return find_baseline([group.settings for group in groups], [[g.label, *g.models] for g in groups], wanted)


def accuracy_difference(own: ResultGroup, other: ResultGroup, benchmark: str, metric: str) -> Interval | None:
    """The difference `own` - `other` of an accuracy with its bootstrap interval over problems and seeds.

    Paired by problem over the problems that all results have, and by seed over the seeds that both groups have, if
    these are at least two. None if there is nothing to compare.
    """
    sides = [group.with_metric(benchmark, metric) for group in (own, other)]
    shared = [seed for seed in sides[0] if seed in sides[1]]
    paired = len(shared) > 1
    if paired:
        sides = [{seed: side[seed] for seed in shared} for side in sides]
    if not all(sides):
        return None
    tables = [[result.per_problem[metric] for result in side.values()] for side in sides]
    problems = sorted(set.intersection(*(set(values) for table in tables for values in table)))
    if not problems:
        return None
    values = [np.array([[each[problem] for problem in problems] for each in table]) for table in tables]
    return bootstrap_difference(*values, paired=paired)
