"""The tables at the top of the report, and the notes on what they do and do not show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_g2rl.report.charts import HEADLINES
from megatron_g2rl.report.groups import ABSENT, METHOD, SEED, RunGroup, method_name, setting
from megatron_g2rl.report.intervals import seed_interval
from megatron_g2rl.report.runs import Run
from megatron_g2rl.report.series import (
    TAIL,
    averaged,
    compared_steps,
    mean_change,
    show,
    show_change,
    show_spread,
    start_and_end,
)
from megatron_g2rl.tracking.health import WINDOW, health
from megatron_g2rl.tracking.table import METRICS, Metric, members

MOST_SEEDS = 5
"""Seeds of a group that are listed, not counted."""


@dataclass(frozen=True)
class Line:
    """One run or one group."""

    label: str
    group: int
    """Index of the group."""
    cells: list[str]


@dataclass(frozen=True)
class Summary:
    """Content of the summary."""

    columns: list[str]
    groups: list[Line]
    runs: list[Line]
    notes: list[str]
    attention: list[Line]
    """What is wrong with a run, in words, for those with which something is."""


def summarize(groups: Sequence[RunGroup]) -> Summary:
    """Facts and headline metrics of each group and each run."""
    runs = [run for group in groups for run in group.runs]
    names = set().union(*(run.names() for run in runs))
    metrics = [m for row in METRICS for m in members(row, names & set(HEADLINES))]
    changes = {metric.name: start_and_end(runs, metric.name) for metric in metrics}
    lines, group_lines, attention, first = [], [], [], 0
    for number, group in enumerate(groups):
        own = {name: pairs[first : first + len(group.runs)] for name, pairs in changes.items()}
        first += len(group.runs)
        cells = [_group_value(group, own[metric.name], metric) for metric in metrics]
        group_lines.append(
            Line(group.label, number, [method_name(group.settings), _seeds(group), _steps(group.runs), *cells])
        )
        for index, run in enumerate(group.runs):
            cells = [show_change(own[metric.name][index], metric.unit == "fraction") for metric in metrics]
            facts = [method_name(run.settings), setting(run.settings, SEED), _steps([run])]
            lines.append(Line(run.label, number, [*facts, *cells]))
            if sentences := health(list(run.metrics.values())[-WINDOW:]):
                attention.append(Line(run.label, number, sentences))
    columns = [metric.title + (f" ({metric.unit})" if metric.unit != "fraction" else "") for metric in metrics]
    several = len(groups) < len(runs)
    columns = ["Method", "Seeds" if several else "Seed", "Steps", *columns]
    return Summary(columns, group_lines, lines, _notes(groups, runs), attention)


def _group_value(group: RunGroup, pairs: Sequence[tuple[float, float]], metric: Metric) -> str:
    """Mean over the seeds at the start and at the end, with half of the width of the interval of the latter."""
    percent = metric.unit == "fraction"
    interval = seed_interval(dict(zip(group.seeds, (end for _, end in pairs), strict=True)))
    start, end = mean_change(pairs)
    if not interval.is_known:
        return show_change((start, end), percent)
    first, last = show(start, percent), show_spread(end, interval.half_width, percent)
    return last if first == show(end, percent) else f"{first} → {last}"


def _seeds(group: RunGroup) -> str:
    return ", ".join(group.seeds) if len(group.seeds) <= MOST_SEEDS else f"{len(group.seeds)} seeds"


def _steps(runs: Sequence[Run]) -> str:
    counts = sorted({len(run.steps) for run in runs})
    text = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    planned = runs[0].settings.get("trainer.steps")
    return f"{text} of {planned:,}" if isinstance(planned, int) else text


def _notes(groups: Sequence[RunGroup], runs: Sequence[Run]) -> list[str]:
    steps = compared_steps(runs)
    count = averaged(len(steps))
    which = "that all runs have" if len(runs) > 1 else "of the run"
    what = f"means over the first and the last {count} steps" if count > 1 else "the first and the last step"
    notes = [f"“a → b” are {what} {which}; evaluations are not averaged."]
    if not steps:
        notes = ["The runs have no step in common: “a → b” describes the first and the last steps of each run."]
    elif count < TAIL:
        notes.append("These are too few steps for a comparison.")
    sizes = [len(group.runs) for group in groups]
    if max(sizes) > 1:
        notes.append("With several seeds, these are means over seeds; ± is half of the 95% t interval of the mean “b”.")
    if min(sizes) == 1:
        subject = "This run" if len(runs) == 1 else "At least one setting" if max(sizes) > 1 else "Every setting"
        notes.append(
            f"{subject} has one seed. One seed is not evidence that a setting is better or worse: another seed of the "
            "same setting may change the result by more than the difference seen here."
        )
    longest = max(run.steps[-1] for run in runs)
    for run in runs:
        if 2 * (run.steps[-1] + 1) < longest + 1:
            notes.append(
                f"{run.label} ends at step {run.steps[-1]:,} of {longest:,}, which limits all comparisons to its "
                "steps: leave it out to compare the others."
            )
        if run.broken_lines:
            notes.append(f"{run.label}: {run.broken_lines} lines of its files could not be read and are omitted.")
        if setting(run.settings, METHOD) == ABSENT:
            notes.append(f"{run.label} has no readable config.yaml: its settings are unknown.")
    return notes
