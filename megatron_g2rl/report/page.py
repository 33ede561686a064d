"""Renders the template with numbers, charts and texts, and writes the page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_g2rl import __version__
from megatron_g2rl.errors import UserError
from megatron_g2rl.report.charts import COST, Chart, is_phase, leftover, sections
from megatron_g2rl.report.plots import Curve, draw_curves, draw_stack
from megatron_g2rl.report.responses import sample_responses
from megatron_g2rl.report.runs import EVALUATION, Run, read_runs, short_labels
from megatron_g2rl.report.series import mean, numbers, show, smooth, smoothing_window
from megatron_g2rl.report.settings import differing, ledger, setting_rows
from megatron_g2rl.report.summary import summarize

HERE = Path(__file__).parent


@dataclass(frozen=True)
class NumberRow:
    """One row of the table below a chart."""

    run: int
    style: int
    label: str
    cells: list[str]


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Write a page about these runs to `output`.

    Raises:
        UserError: a folder contains no run, there are more than eight, or `output` cannot be written.
    """
    page = report_page(read_runs(folders))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # JSON can contain lone surrogates, which UTF-8 cannot encode.
        output.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}; name another file") from error


def report_page(runs: Sequence[Run]) -> str:
    """The page as HTML: no scripts or external resources; all text from the runs is escaped."""
    names = set().union(*(run.names() for run in runs))
    window = smoothing_window(max(len(run.steps) for run in runs))
    drawn = sections(names)
    rows = setting_rows(runs)
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("page.html.jinja").render(
        runs=runs,
        short=short_labels([run.label for run in runs]),
        version=__version__,
        style=Markup((HERE / "page.css").read_text()),
        window=window,
        summary=summarize(runs),
        sections=[(section, [(chart, *_chart(chart, runs, window)) for chart in section.charts]) for section in drawn],
        timed=COST.title,
        phases=_phases(runs, window),
        others=[(name, [_other_cells(run, name) for run in runs]) for name in leftover(names, drawn)],
        settings=rows,
        differing=differing(rows),
        ledgers=[ledger(run) for run in runs],
        samples=[sample_responses(run) for run in runs],
    )
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def _chart(chart: Chart, runs: Sequence[Run], window: int) -> tuple[Markup, list[NumberRow]]:
    """The SVG of a chart and the rows of its table."""
    evaluated = any(line.metric.startswith(EVALUATION) for line in chart.lines)
    curves, rows = [], []
    for style, line in enumerate(chart.lines):
        for number, run in enumerate(runs):
            steps, values = run.series(line.metric)
            curves.append(Curve(steps, values, number, style))
            rows.append(NumberRow(number, style, line.label, _cells(chart, steps, values)))
    ends = "; ".join(f"{runs[row.run].label} {row.label}: {row.cells[0]} to {row.cells[1]}" for row in rows)
    alt = f"Line chart of {chart.title.lower()} over the steps. First to last value: {ends}."
    flags: dict[str, Any] = dict(percent=chart.percent, log=chart.log, reference=chart.reference)
    rows.sort(key=lambda row: row.run)
    return Markup(draw_curves(curves, 1 if evaluated else window, alt, **flags)), rows


def _cells(chart: Chart, steps: Sequence[int], values: Sequence[float]) -> list[str]:
    """First, last, best with its step (or the range if neither direction is better), mean of the last ten."""
    n = numbers(steps, values)
    low, high = show(n.lowest, chart.percent), show(n.highest, chart.percent)
    if math.isnan(n.first):
        best = low
    elif chart.better:
        best = f"{high} @ {n.highest_step}" if chart.better == "higher" else f"{low} @ {n.lowest_step}"
    else:
        best = f"{low} to {high}"
    return [show(n.first, chart.percent), show(n.last, chart.percent), best, show(n.tail_mean, chart.percent)]


def _other_cells(run: Run, name: str) -> list[str]:
    n = numbers(*run.series(name))
    return [show(n.first), show(n.last), show(n.tail_mean)]


@dataclass(frozen=True)
class Phases:
    """Time per phase of all runs."""

    drawings: list[Markup]
    """One for each run."""
    rows: list[tuple[str, list[list[str]]]]
    """Name of the phase, and for each run: first, last, minimum and tail mean in seconds, and fraction of the time."""


def _phases(runs: Sequence[Run], window: int) -> Phases | None:
    """Stacked time per phase, with the time between phases as `other`; None if no run has phase times."""
    names = sorted({name for run in runs for name in run.names() if is_phase(name)})
    names = [name for name in names if any(name in values for run in runs for values in run.metrics.values())]
    if not names:
        return None
    names.sort(key=lambda name: -max(mean(run.series(name)[1]) for run in runs if name in run.names()))
    stacks = [_stack(run, names) for run in runs]
    smoothed = [[smooth(layer, window) for layer in layers] for layers in stacks]
    top = 1.05 * max(sum(layer[i] for layer in layers) for layers in smoothed for i in range(len(layers[0]))) or 1.0
    labels = [name.removeprefix("time/").removesuffix("_s") for name in names] + ["other"]
    drawings = [
        Markup(draw_stack(run.steps, layers, top, f"Stacked seconds of {', '.join(labels)} per step in {run.label}."))
        for run, layers in zip(runs, smoothed, strict=True)
    ]
    rows = [
        (label, [_phase_cells(run, layers, i) for run, layers in zip(runs, stacks, strict=True)])
        for i, label in enumerate(labels)
    ]
    return Phases(drawings, rows)


def _stack(run: Run, names: Sequence[str]) -> list[list[float]]:
    """Seconds of each phase and, last, the rest of the step; 0 where nothing was measured."""
    layers = [[0.0 if math.isnan(value) else max(value, 0.0) for value in run.series(name)[1]] for name in names]
    total = run.series("time/step_s")[1]
    sums = [sum(layer[i] for layer in layers) for i in range(len(total))]
    return [*layers, [0.0 if math.isnan(t) else max(t - s, 0.0) for t, s in zip(total, sums, strict=True)]]


def _phase_cells(run: Run, layers: Sequence[Sequence[float]], number: int) -> list[str]:
    n = numbers(run.steps, layers[number])
    total = sum(map(sum, layers))
    fraction = sum(layers[number]) / total if total else math.nan
    return [show(n.first), show(n.last), show(n.lowest), show(n.tail_mean), show(fraction, percent=True)]
