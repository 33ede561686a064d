"""Sections of the page: which metrics are drawn in which chart, which are listed only, and which do not change.

`tracking/table.py` owns titles, units, order and explanations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megatron_g2rl.report.groups import RunGroup
from megatron_g2rl.report.runs import Run
from megatron_g2rl.report.series import mean_change, show, show_change, start_and_end
from megatron_g2rl.tracking.table import SECTIONS, Metric, Section, members, unknown_names

HEADLINES = ("reward/pass_rate", "evaluation/pass_at_1", "time/step_s")
"""Metrics whose values are in the summary at the top, and not again in the section of their charts."""
PHASES = "Time per phase"
"""The chart that is drawn as bars."""
MOST_SHARED = 3
"""Groups whose metrics share a chart; with more groups each metric has a chart of its own."""


@dataclass(frozen=True)
class Drawn:
    """The metrics of a section, by how they are shown."""

    section: Section
    charts: dict[str, list[Metric]] = field(default_factory=dict)
    """Metrics by title of the chart; the second is dashed, the third dotted."""
    listed: list[tuple[Metric, list[str]]] = field(default_factory=list)
    """Metrics in the table of values, with their cells for each group."""
    constant: list[str] = field(default_factory=list)
    """Titles of metrics that keep one value in every run, with the values."""
    repeated: list[str] = field(default_factory=list)
    """Titles of metrics with the same values as an earlier one, with its title."""


def sections(groups: Sequence[RunGroup]) -> list[Drawn]:
    """The sections of the table that have a metric of these runs, and one of the metrics that are not in the table."""
    runs = [run for group in groups for run in group.runs]
    names = set().union(*(run.names() for run in runs))
    other = tuple(Metric(name, name, "", "", plotted=False) for name in sorted(unknown_names(names)))
    seen: dict[object, str] = {}
    drawn = [_section(section, groups, names, seen) for section in SECTIONS]
    drawn.append(_section(Section("Other metrics", "Not in docs/metrics.md.", other), groups, names, seen))
    return [part for part in drawn if part.charts or part.listed or part.constant or part.repeated]


def _section(section: Section, groups: Sequence[RunGroup], names: Iterable[str], seen: dict[object, str]) -> Drawn:
    drawn = Drawn(section)
    runs = [run for group in groups for run in group.runs]
    rows = section.metrics if section not in SECTIONS else (m for row in section.metrics for m in members(row, names))
    for metric in rows:
        values = [_values(run, metric.name) for run in runs]
        title = metric.title.replace(": ", ", ")
        if all(len(set(part.values())) < 2 for part in values) and any(len(part) > 1 for part in values):
            shown = dict.fromkeys(show(value, metric.unit == "fraction") for part in values for value in part.values())
            drawn.constant.append(title if metric.name in HEADLINES else f"{title} ({' / '.join(shown)})")
            continue
        if (first := seen.setdefault(str(values), title)) != title:
            drawn.repeated.append(f"{title} (as {first})")
            continue
        if metric.name not in HEADLINES:
            drawn.listed.append((metric, _cells(metric, title, groups, values, seen)))
        if metric.plotted and any(len(part) > 1 for part in values):
            chart = metric.title.partition(": ")[0]
            alone = len(groups) > MOST_SHARED and chart != PHASES
            drawn.charts.setdefault(metric.title if alone else chart, []).append(metric)
    return drawn


def _cells(
    metric: Metric, title: str, groups: Sequence[RunGroup], values: Sequence[dict[int, float]], seen: dict[object, str]
) -> list[str]:
    """Start and end value for each group, or the title of an earlier metric with the same values in this group."""
    pairs = iter(start_and_end([run for group in groups for run in group.runs], metric.name))
    remaining = iter(values)
    cells = []
    for number, group in enumerate(groups):
        own = [next(remaining) for _ in group.runs]
        change = mean_change([next(pairs) for _ in group.runs])
        varies = any(len(set(part.values())) > 1 for part in own)
        first = seen.setdefault((number, str(own)), title) if varies else title
        cells.append(show_change(change, metric.unit == "fraction") if first == title else f"as {first}")
    return cells


def _values(run: Run, name: str) -> dict[int, float]:
    return {step: value for step, value in zip(*run.series(name), strict=True) if not math.isnan(value)}
