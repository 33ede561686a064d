"""Draws charts as inline SVG with matplotlib.

No text of a run gets into a drawing (names stand in the tables below it), so nothing in it needs escaping. Colours are
written as CSS variables: one drawing serves light and dark.
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
"""Styles of the lines of one chart, in order."""
WIDTH, HEIGHT = 5.6, 2.9
"""Inches of 72 CSS pixels: about what a drawing measures on the screen, so that its text keeps its size."""
TEXT, GRID = "#010203", "#010204"
"""Colours nobody would choose; they and those of `_colour` stand for CSS variables until the drawing is done."""
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
    """One line of a drawing."""

    steps: Sequence[int]
    values: Sequence[float]
    """NaN leaves a gap."""
    colour: int
    """Number of the run: the CSS variable --run-N."""
    style: int = 0
    """Number of the line within its chart."""


def draw_curves(
    curves: Sequence[Curve],
    window: int,
    alt: str,
    *,
    percent: bool = False,
    log: bool = False,
    reference: float | None = None,
) -> str:
    """Raw values thin, the smoothed ones bold; with a window of 1 the values themselves, each point marked.

    Args:
        curves: what is drawn.
        window: steps of the moving average.
        alt: what a screen reader says.
        percent: whether values are shares.
        log: logarithmic axis; values that are not positive are left out.
        reference: height of a thin horizontal line.
    """
    figure, axes = _axes(percent)
    for curve in curves:
        colour, style = _colour("run", curve.colour), DASHES[curve.style % len(DASHES)]
        values = [value if value > 0 or not log else math.nan for value in curve.values]
        if window > 1:
            axes.plot(curve.steps, values, color=colour, linewidth=0.8, alpha=0.3)
            axes.plot(curve.steps, smooth(values, window), color=colour, linewidth=1.8, linestyle=style)
        else:
            axes.plot(curve.steps, values, color=colour, linewidth=1.6, linestyle=style, marker="o", markersize=3)
    _scale(axes, [value for curve in curves for value in curve.values if not math.isnan(value)], percent, log)
    if reference is not None:
        axes.axhline(reference, color=TEXT, linewidth=0.7)
    return _svg(figure, alt)


def draw_stack(steps: Sequence[int], layers: Sequence[Sequence[float]], top: float, alt: str) -> str:
    """Layers on one another, the first at the bottom, in the colours --phase-N; no layer holds a NaN.

    Args:
        steps: where the layers have values.
        layers: seconds of each phase.
        top: upper end of the axis, the same for all runs.
        alt: what a screen reader says.
    """
    figure, axes = _axes(percent=False)
    colours = [_colour("phase", number) for number in range(len(layers))]
    if len(steps) > 1:
        axes.stackplot(steps, layers, colors=colours, linewidth=0)
        axes.set_xlim(steps[0], steps[-1])
    else:
        bottom = 0.0
        for layer, colour in zip(layers, colours, strict=True):
            axes.bar(steps, layer, bottom=bottom, color=colour, width=0.4)
            bottom += layer[0]
    axes.set_ylim(0, top)
    return _svg(figure, alt)


def _scale(axes: Axes, values: Sequence[float], percent: bool, log: bool) -> None:
    """Axis of the values: shares stay between 0 and 1, and zeros throughout lie at the bottom, not in the middle."""
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


def _colour(kind: Literal["run", "phase"], number: int) -> str:
    """The placeholder of the CSS variable --KIND-NUMBER."""
    return f"#{_KINDS.index(kind) + 2:02x}{number:02x}77"


def _variable(placeholder: re.Match[str]) -> str:
    return f"var(--{_KINDS[int(placeholder[1], 16) - 2]}-{int(placeholder[2], 16)})"


def _svg(figure: Figure, alt: str) -> str:
    """The drawing as an element of the page; its ids are unlike those of any other drawing."""
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
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)  # the page's own typeface
    view = re.search(r'viewBox="[^"]*"', text)[0]
    inside = text[text.index(">") + 1 :]
    return f'<svg {view} role="img" aria-label="{html.escape(alt)}">{inside}'
