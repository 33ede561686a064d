"""The final numbers of groups of runs, their costs, and their differences to a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megatron_g2rl.report.groups import SEED, RunGroup, find_baseline, setting, setting_key
from megatron_g2rl.report.intervals import CONFIDENCE, Interval, seed_difference, seed_interval
from megatron_g2rl.report.results import Result, ResultGroup, accuracy_difference
from megatron_g2rl.report.runs import Run
from megatron_g2rl.report.series import averaged, compared_steps, mean, show_spread, show_to, start_and_end
from megatron_g2rl.report.tables import in_points, markdown_line, result_columns, unit
from megatron_g2rl.tracking.table import METRICS, Metric, members

FINAL = {
    "Accuracy": (
        "reward/pass_rate",
        "evaluation/pass_at_*",
        "evaluation/maj_at_*",
        "evaluation/*/pass_at_*",
        "evaluation/*/maj_at_*",
        "evaluation/distinct_correct_at_*",
        "evaluation/*/distinct_correct_at_*",
    ),
    "Exploration": (
        *("policy/entropy", "exploration/novelty_mean", "geometry/mean_cosine", "geometry/negative_fraction"),
        *("geometry/effective_rank", "response/distinct_correct", "exploration/covariance_mixed"),
        "exploration/covariance_all_incorrect",
    ),
    "Responses": ("response_length/mean", "response/truncated_fraction", "response/unparsed_fraction"),
}
"""Metrics whose final values are compared, as in `tracking/table.py`, by heading."""
COSTS = ("time/step_s", "time/rollout_s", "time/update_s", "cost/exploration_s", "throughput/response_tokens_per_s")
"""Metrics that are compared over all steps."""
MOST_COLUMNS = 4
"""With more settings than this, each is a row of the Markdown tables instead of a column."""
HOURS = Metric("", "Time of all steps", "h", "")
TOKENS = Metric("", "Response tokens of all steps", "millions", "")


@dataclass(frozen=True)
class Cell:
    """One metric of one group."""

    value: str
    difference: str
    """Difference to the baseline; empty for the baseline itself, and where there is none."""


@dataclass(frozen=True)
class Row:
    """One metric of all groups."""

    title: str
    unit: str
    cells: list[Cell]


@dataclass(frozen=True)
class Comparison:
    """The table and what its numbers are."""

    baseline: int
    """Index of the group with which the others are compared."""
    blocks: dict[str, list[Row]]
    """Rows by heading."""
    notes: list[str]


def compare(
    groups: Sequence[RunGroup], results: Sequence[Result] = (), baseline: str | None = None
) -> Comparison | None:
    """The comparison of these groups; None if there is only one, or nothing to estimate intervals from and no baseline.

    Args:
        groups: at least one.
        results: of `g2rl evaluate`; those of checkpoints of these runs are compared problem by problem.
        baseline: label of a group or name of a run; by default the group without exploration.

    Raises:
        UserError: there is no group of this name.
    """
    names = [[group.label, group.short, *_run_names(group)] for group in groups]
    number = find_baseline([group.settings for group in groups], names, baseline)
    single = max(len(group.runs) for group in groups) == 1
    if len(groups) < 2 or (single and not results and baseline is None):
        return None
    runs = [run for group in groups for run in group.runs]
    measured = set().union(*(run.names() for run in runs))
    blocks = {
        heading: [
            _row(m, groups, [end for _, end in start_and_end(runs, m.name)], number) for m in _of(names, measured)
        ]
        for heading, names in FINAL.items()
    }
    blocks["Cost"] = _costs(groups, runs, measured, number)
    evaluated = [_results_of(group, results) for group in groups]
    blocks = {"Accuracy by g2rl evaluate": _evaluated(evaluated, number)} | blocks
    return Comparison(
        number,
        {heading: rows for heading, rows in blocks.items() if rows},
        _notes(groups, runs, results, evaluated, number),
    )


def comparison_markdown(groups: Sequence[RunGroup], comparison: Comparison) -> str:
    """The comparison as Markdown: a table for each heading, with the difference after the value, and the notes.

    With more than `MOST_COLUMNS` groups, each has a row instead of a column.
    """
    labels = [group.label for group in groups]
    labels[comparison.baseline] += " (baseline)"
    parts = []
    for heading, rows in comparison.blocks.items():
        table = [[heading, *labels]]
        for row in rows:
            cells = [f"{cell.value}; {cell.difference}" if cell.difference else cell.value for cell in row.cells]
            table.append([f"{row.title} ({row.unit})" if row.unit else row.title, *cells])
        if len(labels) > MOST_COLUMNS:
            table = [list(column) for column in zip(*table, strict=True)]
        lines = [markdown_line(line) for line in table]
        parts.append("\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]]))
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in comparison.notes)]) + "\n"


def _run_names(group: RunGroup) -> list[str]:
    return [name for run in group.runs for name in (run.label, run.folder.name, str(run.folder))]


def _of(patterns: Iterable[str], measured: Iterable[str]) -> list[Metric]:
    """The metrics with these names or of these families that were measured."""
    return [m for pattern in patterns for row in METRICS if row.name == pattern for m in members(row, measured)]


def _row(metric: Metric, groups: Sequence[RunGroup], values: Sequence[float], baseline: int) -> Row:
    """A row of values of all runs, group after group."""
    remaining = iter(values)
    by_seed = [dict(zip(group.seeds, [next(remaining) for _ in group.runs], strict=True)) for group in groups]
    percent = metric.unit == "fraction"
    cells = []
    for number, own in enumerate(by_seed):
        difference = None if number == baseline else seed_difference(own, by_seed[baseline])
        cells.append(Cell(_with_spread(seed_interval(own), percent), _difference(difference, percent)))
    unit = "" if percent else metric.unit
    return Row(metric.title.replace(": ", ", "), unit, cells)


def _with_spread(interval: Interval, percent: bool) -> str:
    return show_spread(interval.mean, interval.half_width, percent)


def _difference(difference: Interval | None, percent: bool) -> str:
    if difference is None or math.isnan(difference.mean):
        return ""
    if percent:
        return in_points(difference).replace("-", "\N{MINUS SIGN}")
    scale = difference.half_width if difference.is_known else abs(difference.mean) / 10
    mean, low, high = (show_to(value, scale, "+") for value in (difference.mean, difference.low, difference.high))
    return (f"{mean} ({low} to {high})" if difference.is_known else mean) + ("*" if difference.excludes_zero else "")


def _costs(groups: Sequence[RunGroup], runs: Sequence[Run], measured: set[str], baseline: int) -> list[Row]:
    """Means over all compared steps, and the totals."""
    steps = set(compared_steps(runs))

    def over_steps(run: Run, value: Callable[[dict[str, float]], float]) -> list[float]:
        return [value(values) for step, values in run.metrics.items() if not steps or step in steps]

    def total(metric: Metric, scale: float, value: Callable[[dict[str, float]], float]) -> Row:
        per_run = [over_steps(run, value) for run in runs]
        sums = [sum(own) * scale if not any(map(math.isnan, own)) else math.nan for own in per_run]
        return _row(metric, groups, sums, baseline)

    rows = [
        _row(
            metric,
            groups,
            [mean(over_steps(run, lambda values, name=metric.name: values.get(name, math.nan))) for run in runs],
            baseline,
        )
        for metric in _of(COSTS, measured)
    ]
    if "time/step_s" in measured:
        rows.append(total(HOURS, 1 / 3600, lambda values: values.get("time/step_s", math.nan)))
    if {"response/count", "response_length/mean"} <= measured:
        names = ("response/count", "response_length/mean")
        rows.append(total(TOKENS, 1e-6, lambda values: math.prod(values.get(name, math.nan) for name in names)))
    return rows


def _results_of(group: RunGroup, results: Sequence[Result]) -> ResultGroup:
    """The results of the checkpoints of these runs, of the largest number of steps that was evaluated."""
    runs = {(setting_key(run.settings), setting(run.settings, "run.name")): run for run in group.runs if run.settings}
    seeds = set(group.seeds)
    own = [
        result
        for result in results
        if (setting_key(result.settings), setting(result.settings, "run.name")) in runs
        and setting(result.settings, SEED) in seeds
    ]
    latest = max((result.step for result in own), default=0)
    own = [result for result in own if result.step == latest]
    models = tuple(dict.fromkeys(result.model for result in own))
    by_seed = {(setting(result.settings, SEED), result.benchmark): result for result in own}
    return ResultGroup(group.label, models, {"step": latest}, by_seed)


def _evaluated(evaluated: Sequence[ResultGroup], baseline: int) -> list[Row]:
    rows = []
    for benchmark, metric in result_columns([result for group in evaluated for result in group.results.values()]):
        cells, (scale, _) = [], unit(metric)
        percent = scale == 100
        for number, group in enumerate(evaluated):
            accuracy = group.accuracy(benchmark, metric) or Interval(math.nan)
            difference = None
            if number != baseline:
                difference = accuracy_difference(group, evaluated[baseline], benchmark, metric)
            cells.append(Cell(_with_spread(accuracy, percent), _difference(difference, percent)))
        rows.append(Row(f"{benchmark}, {metric.replace('_at_', '@')}", "", cells))
    return rows


def _notes(
    groups: Sequence[RunGroup],
    runs: Sequence[Run],
    results: Sequence[Result],
    evaluated: Sequence[ResultGroup],
    baseline: int,
) -> list[str]:
    count = averaged(len(compared_steps(runs)))
    notes = [
        f"Values: means over the last {count} steps that all runs have (costs: over all of these steps), "
        "or the last evaluation that all runs have."
        if count > 1
        else "Values: the last step or evaluation that all runs have."
    ]
    if max(len(group.runs) for group in groups) > 1:
        notes.append(f"± is half of the {CONFIDENCE:.0%} t interval of the mean over seeds.")
        notes.append(
            f"The second number is the difference to {groups[baseline].label} (of fractions in points) with its "
            f"{CONFIDENCE:.0%} interval, paired by seed where two or more seeds are the same, else Welch's; * marks "
            "intervals that exclude 0. They are not corrected for the number of comparisons."
        )
    else:
        notes.append(f"The second number is the difference to {groups[baseline].label} (of fractions in points).")
    models = {model for group in evaluated for model in group.models}
    if models:
        steps = {group.label: group.settings["step"] for group in evaluated if group.models}
        which = (
            f"step {next(iter(steps.values()))}"
            if len(set(steps.values())) == 1
            else ", ".join(f"step {step} ({label})" for label, step in steps.items())
        )
        notes.append(
            f"g2rl evaluate: checkpoints of {which}; intervals of differences by bootstrap over problems and seeds, "
            "paired by problem, and by seed where possible."
        )
    if unused := sorted({result.model for result in results} - models):
        notes.append(f"Evaluated, but not the latest checkpoints of these runs: {', '.join(unused)}.")
    return notes
