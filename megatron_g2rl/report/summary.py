"""The table at the top of the report, and the notes on what it does and does not show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

from megatron_g2rl.report.charts import HEADLINES
from megatron_g2rl.report.runs import Run
from megatron_g2rl.report.series import TAIL, averaged, compared_steps, mean, show, show_change, start_and_end
from megatron_g2rl.report.settings import ABSENT, same_setting_groups, setting
from megatron_g2rl.tracking.health import WINDOW, health
from megatron_g2rl.tracking.table import METRICS, Metric, members

METHODS = {"gradient": "G2RL", "none": "GRPO", "semantic": "EVOL-RL", "partition": "DARLING"}
"""Display names of the values of `exploration.method`."""


@dataclass(frozen=True)
class Line:
    """One run, or the mean over the seeds of one setting."""

    label: str
    cells: list[str]


@dataclass(frozen=True)
class Summary:
    """Content of the summary."""

    columns: list[str]
    runs: list[Line]
    seeds: list[Line]
    """Mean and standard deviation over seeds, for each setting that has several."""
    notes: list[str]


def summarize(runs: Sequence[Run]) -> Summary:
    """Facts and headline metrics of each run, with the mean over the seeds of one setting."""
    names = set().union(*(run.names() for run in runs))
    metrics = [m for row in METRICS for m in members(row, names & set(HEADLINES))]
    changes = [start_and_end(runs, metric.name) for metric in metrics]
    lines = []
    for number, run in enumerate(runs):
        cells = [show_change(pairs[number], m.unit == "fraction") for m, pairs in zip(metrics, changes, strict=True)]
        lines.append(Line(run.label, [_method(run), setting(run, "run.seed"), _steps(run), *cells]))
    groups = same_setting_groups(runs)
    seeds = []
    for group in groups:
        if _seeds(runs, group) > 1:
            ends = [[pairs[number][1] for number in group] for pairs in changes]
            cells = [_spread(values, metric) for values, metric in zip(ends, metrics, strict=True)]
            seeds.append(Line(f"mean of {_seeds(runs, group)} seeds", [_method(runs[group[0]]), "", "", *cells]))
    columns = [metric.title + (f" ({metric.unit})" if metric.unit != "fraction" else "") for metric in metrics]
    return Summary(["Method", "Seed", "Steps", *columns], lines, seeds, _notes(runs, groups))


def _method(run: Run) -> str:
    return METHODS.get(setting(run, "exploration.method"), setting(run, "exploration.method"))


def _steps(run: Run) -> str:
    planned = run.settings.get("trainer.steps")
    return f"{len(run.steps):,} of {planned:,}" if isinstance(planned, int) else f"{len(run.steps):,}"


def _seeds(runs: Sequence[Run], group: list[int]) -> int:
    return len({setting(runs[number], "run.seed") for number in group})


def _spread(values: Sequence[float], metric: Metric) -> str:
    present = [value for value in values if not math.isnan(value)]
    percent = metric.unit == "fraction"
    return show(mean(present), percent) + (f" ± {show(stdev(present), percent)}" if len(present) > 1 else "")


def _notes(runs: Sequence[Run], groups: list[list[int]]) -> list[str]:
    steps = compared_steps(runs)
    count = averaged(len(steps))
    which = "that all runs have" if len(runs) > 1 else "of the run"
    what = f"means over the first and the last {count} steps" if count > 1 else "the first and the last step"
    notes = [f"“a → b” are {what} {which}; evaluations are not averaged."]
    if not steps:
        notes = ["The runs have no step in common: “a → b” describes the first and the last steps of each run."]
    elif count < TAIL:
        notes.append("These are too few steps for a comparison.")
    if max(_seeds(runs, group) for group in groups) > 1:
        notes.append("A row “mean of n seeds” shows the mean of their values “b” ± the standard deviation.")
    if min(_seeds(runs, group) for group in groups) == 1:
        several = any(_seeds(runs, group) > 1 for group in groups)
        which = "This run" if len(runs) == 1 else "At least one setting" if several else "Every setting"
        notes.append(
            f"{which} has one seed. One seed is no evidence that a setting is better or worse: another seed of the "
            "same setting may change the result by more than the difference seen here."
        )
    for run in runs:
        if sentences := health(list(run.metrics.values())[-WINDOW:]):
            notes.append(f"{run.label}, in its last steps: {'; '.join(sentences)}.")
        if run.broken_lines:
            notes.append(f"{run.label}: {run.broken_lines} lines of its files could not be read and are omitted.")
        if setting(run, "exploration.method") == ABSENT:
            notes.append(f"{run.label} has no readable config.yaml: its settings are unknown.")
    return notes
