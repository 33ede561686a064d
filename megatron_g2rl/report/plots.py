"""Draws charts as inline SVG with matplotlib.

A chart contains no text from the runs (names are in the table below it), so nothing needs escaping. Colors are CSS
variables, so that one SVG works in light and dark mode.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from megatron_g2rl.report.series import smooth

DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
"""Line styles within one chart, in order."""
WIDTH, HEIGHT = 5.6, 2.9
"""Inches of 72 CSS pixels: about the size on the screen, so that text keeps its size."""
TEXT, GRID = "#010203", "#010204"
"""Placeholder colors that, like those of `_color`, are replaced with CSS variables after drawing."""
_KINDS = ("run", "phase")
_SETTINGS = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "mathtext.default": "regular",
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    steps: Sequence[int]
    values: Sequence[float]
    """NaN leaves a gap."""
    color: int
    """Index of the run: the CSS variable --run-N."""
    style: int = 0
    """Index of the line within its chart."""


def draw_curves(
    curves: Sequence[Curve],
    window: int,
    alt: str,
    *,
    percent: bool = False,
    log: bool = False,
    reference: float | None = None,
) -> str:
    """Draw raw values as thin lines and smoothed values as bold lines; with a window of 1, raw values with markers.

    Args:
        curves: the lines to draw.
        window: steps of the moving average.
        alt: alternative text for screen readers.
        percent: whether values are fractions.
        log: logarithmic axis; non-positive values are omitted.
        reference: value of a thin horizontal line.
    """
    figure, axes = _axes(percent)
    for curve in curves:
        color, style = _color("run", curve.color), DASHES[curve.style % len(DASHES)]
        values = [value if value > 0 or not log else math.nan for value in curve.values]
        if window > 1:
            axes.plot(curve.steps, values, color=color, linewidth=0.8, alpha=0.3)
            axes.plot(curve.steps, smooth(values, window), color=color, linewidth=1.8, linestyle=style)
        else:
            axes.plot(curve.steps, values, color=color, linewidth=1.6, linestyle=style, marker="o", markersize=3)
    _scale(axes, [value for curve in curves for value in curve.values if not math.isnan(value)], percent, log)
    if reference is not None:
        axes.axhline(reference, color=TEXT, linewidth=0.7)
    return _svg(figure, alt)


def draw_stack(steps: Sequence[int], layers: Sequence[Sequence[float]], top: float, alt: str) -> str:
    """Stacked layers, the first at the bottom, in the colors --phase-N; no layer contains NaN.

    Args:
        steps: steps of the values.
        layers: seconds of each phase.
        top: upper limit of the axis, the same for all runs.
        alt: alternative text for screen readers.
    """
    figure, axes = _axes(percent=False)
    colors = [_color("phase", number) for number in range(len(layers))]
    if len(steps) > 1:
        axes.stackplot(steps, layers, colors=colors, linewidth=0)
        axes.set_xlim(steps[0], steps[-1])
    else:
        bottom = 0.0
        for layer, color in zip(layers, colors, strict=True):
            axes.bar(steps, layer, bottom=bottom, color=color, width=0.4)
            bottom += layer[0]
    axes.set_ylim(0, top)
    return _svg(figure, alt)


def _scale(axes: Axes, values: Sequence[float], percent: bool, log: bool) -> None:
    """Set the value axis: fractions stay between 0 and 1, and an all-zero line is at the bottom, not in the middle."""
    if log and any(value > 0 for value in values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif not any(values):
        axes.set_ylim(-0.005, 0.1 if percent else 1)
    elif percent:
        low, high = axes.get_ylim()
        high = min(high, 1.0)
        axes.set_ylim(max(low, 0.0) - 0.015 * (high - max(low, 0.0)), high + 0.015 * (high - max(low, 0.0)))


def _power(value: float) -> str:
    return f"{value:.1e}".replace(".0e", "e").replace("-", "\N{MINUS SIGN}")


def _axes(percent: bool) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("step", color=TEXT, loc="right", labelpad=1)
    axes.margins(x=0.02, y=0.08)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    return figure, axes


def _color(kind: Literal["run", "phase"], number: int) -> str:
    """The placeholder color of the CSS variable --KIND-NUMBER."""
    return f"#{_KINDS.index(kind) + 2:02x}{number:02x}77"


def _variable(placeholder: re.Match[str]) -> str:
    return f"var(--{_KINDS[int(placeholder[1], 16) - 2]}-{int(placeholder[2], 16)})"


def _svg(figure: Figure, alt: str) -> str:
    """The figure as an SVG element with ids that are unique on the page."""
    file = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("xlink:href", "href")
    text = re.sub("#(02|03)([0-9a-f]{2})77", _variable, text)
    text = text.replace(TEXT, "var(--muted)").replace(GRID, "var(--grid)")
    mark = hashlib.sha256((alt + text).encode(errors="replace")).hexdigest()[:8]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>d{mark}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)  # use the font of the page
    view = re.search(r'viewBox="[^"]*"', text)[0]
    inside = text[text.index(">") + 1 :]
    return f'<svg {view} role="img" aria-label="{html.escape(alt)}">{inside}'
