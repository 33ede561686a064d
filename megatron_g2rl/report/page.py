"""Renders the template with numbers, charts and texts, and writes the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from megatron_g2rl import __version__
from megatron_g2rl.errors import UserError
from megatron_g2rl.report.charts import PHASES, sections
from megatron_g2rl.report.comparison import compare, comparison_markdown
from megatron_g2rl.report.groups import RunGroup, group_runs
from megatron_g2rl.report.plots import COLORS, SEED_CLASS, Curve, color_of, draw_bars, draw_curves, marker_of
from megatron_g2rl.report.responses import StepSamples, sample_responses
from megatron_g2rl.report.results import Result, read_results
from megatron_g2rl.report.runs import EVALUATION, Run, read_runs
from megatron_g2rl.report.series import mean, seed_band, smoothing_window
from megatron_g2rl.report.settings import setting_rows
from megatron_g2rl.report.summary import summarize
from megatron_g2rl.tracking.table import Metric

HERE = Path(__file__).parent
MARKER_PATHS = {
    "o": "M11 1.2a2.8 2.8 0 1 0 .01 0z",
    "s": "M8.2 1.2h5.6v5.6h-5.6z",
    "^": "M11 0l4 7h-8z",
    "D": "M11 0l4 4-4 4-4-4z",
    "v": "M11 8l4-7h-8z",
    "P": "M9.5 0h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z",
}
"""Outlines of the markers of `plots` in a legend of 22 by 8 pixels."""


def write_report(
    folders: Sequence[Path], output: Path, evaluations: Sequence[Path] = (), baseline: str | None = None
) -> None:
    """Write a page about these runs to `output`, or, if its name ends with `.md`, only their comparison as Markdown.

    Args:
        folders: the runs.
        output: the file.
        evaluations: folders of `g2rl evaluate`.
        baseline: name of the run or setting with which the others are compared; by default the one without exploration.

    Raises:
        UserError: a folder contains no run or no evaluation, there is no such baseline, there is nothing to compare, or
            `output` cannot be written or is a LaTeX file.
    """
    if output.suffix == ".tex":
        raise UserError(f"--output {output}: LaTeX is written only with --table; name a .html or .md file")
    runs, results = read_runs(folders), read_results(evaluations)
    page = report_page(runs, results, baseline) if output.suffix != ".md" else _comparison(runs, results, baseline)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # JSON can contain lone surrogates, which UTF-8 cannot encode.
        output.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}; name another file") from error


def _comparison(runs: Sequence[Run], results: Sequence[Result], baseline: str | None) -> str:
    groups = group_runs(runs)
    comparison = compare(groups, results, baseline)
    if comparison is None:
        raise UserError(
            "--output FILE.md writes a comparison of settings, which needs two of them and several seeds of one, "
            "--evaluations or --baseline; a page (FILE.html) can also show single runs"
        )
    return comparison_markdown(groups, comparison)


def report_page(runs: Sequence[Run], results: Sequence[Result] = (), baseline: str | None = None) -> str:
    """The page as HTML: no scripts or external resources; all text from the runs is escaped."""
    groups = group_runs(runs)
    window = smoothing_window(max(len(run.steps) for run in runs))
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"prose": _prose, "unit": _unit}
    text = environment.get_template("page.html.jinja").render(
        runs=runs,
        groups=groups,
        several=len(groups) < len(runs),
        single=any(len(group.runs) == 1 for group in groups),
        version=__version__,
        style=Markup((HERE / "page.css").read_text()),
        color_of=color_of,
        marker_path=lambda group: MARKER_PATHS[marker_of(group)] if group >= len(COLORS) else "",
        phases=PHASES,
        window=window,
        summary=summarize(groups),
        comparison=compare(groups, results, baseline),
        sections=sections(groups),
        seed_class=SEED_CLASS,
        draw=lambda title, metrics: Markup(_draw(title, metrics, groups, window)),
        settings=setting_rows(groups),
        samples=[_samples(group) for group in groups],
    )
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def _samples(group: RunGroup) -> tuple[str, list[StepSamples]]:
    """Label and responses of the first run of a group that has responses."""
    run = next((run for run in group.runs if run.responses), group.runs[0])
    return run.label, sample_responses(run)


def _draw(title: str, metrics: Sequence[Metric], groups: Sequence[RunGroup], window: int) -> str:
    """The SVG of a chart."""
    if title == PHASES:
        rows = [[values for run in group.runs for values in run.metrics.values()] for group in groups]
        seconds = [[max(0.0, mean([row.get(m.name, 0.0) for row in steps])) for m in metrics] for steps in rows]
        labels = [metric.title.partition(": ")[2] for metric in metrics]
        return draw_bars(
            seconds, labels, f"{title}: stacked seconds per step, mean over all steps, one bar per setting."
        )
    window = 1 if metrics[0].name.startswith(EVALUATION) else window
    curves = [
        _curve(group, metric.name, number, style, window)
        for style, metric in enumerate(metrics)
        for number, group in enumerate(groups)
    ]
    alt = f"Line chart of {title} over the steps."
    return draw_curves(curves, window, alt, percent=metrics[0].unit == "fraction")


def _curve(group: RunGroup, name: str, color: int, style: int, window: int) -> Curve:
    """A metric of one group: its values, or its band if there are several seeds."""
    if len(group.runs) == 1:
        return Curve(*group.runs[0].series(name), color=color, style=style)
    band = seed_band(group.runs, name, window)
    return Curve(band.steps, band.mean, color, style, band.half_width, band.members)


def _unit(metric: Metric) -> str:
    """The unit, unless the title or a percent sign shows it."""
    return "" if metric.unit in ("fraction", *metric.title.lower().replace(":", "").split()) else metric.unit


def _prose(meaning: str) -> Markup:
    """A meaning of the table as a sentence, with its `code` marked up."""
    text = re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(meaning[:1].upper() + meaning[1:])))
    return Markup(text + "." if text else "")
