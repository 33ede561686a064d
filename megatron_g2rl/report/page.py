"""Renders the template with numbers, charts and texts, and writes the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from megatron_g2rl import __version__
from megatron_g2rl.errors import UserError
from megatron_g2rl.report.charts import sections
from megatron_g2rl.report.plots import COLORS, Curve, draw_bars, draw_curves
from megatron_g2rl.report.responses import sample_responses
from megatron_g2rl.report.runs import EVALUATION, Run, read_runs, short_labels
from megatron_g2rl.report.series import mean, smoothing_window
from megatron_g2rl.report.settings import setting_rows
from megatron_g2rl.report.summary import summarize
from megatron_g2rl.tracking.table import Metric

HERE = Path(__file__).parent
PHASES = "Time per phase"
"""The chart that is drawn as bars."""


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
    window = smoothing_window(max(len(run.steps) for run in runs))
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"prose": _prose, "unit": _unit}
    text = environment.get_template("page.html.jinja").render(
        runs=runs,
        short=short_labels([run.label for run in runs]),
        version=__version__,
        style=Markup((HERE / "page.css").read_text()),
        colors=COLORS,
        phases=PHASES,
        window=window,
        summary=summarize(runs),
        sections=sections(runs),
        draw=lambda title, metrics: Markup(_draw(title, metrics, runs, window)),
        settings=setting_rows(runs),
        samples=[sample_responses(run) for run in runs],
    )
    return re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def _draw(title: str, metrics: Sequence[Metric], runs: Sequence[Run], window: int) -> str:
    """The SVG of a chart."""
    if title == PHASES:
        rows = [run.metrics.values() for run in runs]
        seconds = [[max(0.0, mean([row.get(m.name, 0.0) for row in steps])) for m in metrics] for steps in rows]
        labels = [metric.title.partition(": ")[2] for metric in metrics]
        return draw_bars(seconds, labels, f"{title}: stacked seconds per step, mean over all steps, one bar per run.")
    curves = [
        Curve(*run.series(metric.name), color=number, style=style)
        for style, metric in enumerate(metrics)
        for number, run in enumerate(runs)
    ]
    evaluated = metrics[0].name.startswith(EVALUATION)
    alt = f"Line chart of {title} over the steps."
    return draw_curves(curves, 1 if evaluated else window, alt, percent=metrics[0].unit == "fraction")


def _unit(metric: Metric) -> str:
    """The unit, unless the title or a percent sign shows it."""
    return "" if metric.unit in ("fraction", *metric.title.lower().replace(":", "").split()) else metric.unit


def _prose(meaning: str) -> Markup:
    """A meaning of the table as a sentence, with its `code` marked up."""
    text = re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(meaning[:1].upper() + meaning[1:])))
    return Markup(text + "." if text else "")
