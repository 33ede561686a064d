"""Draws charts as inline SVG with matplotlib.

A chart contains no text from the runs (their names are in the legend of the page), so nothing needs escaping. Its
colors are those of a light page; the style sheet inverts their lightness on a dark one.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from megatron_g2rl.report.series import smooth

COLORS = ("#1d4e9e", "#e06000", "#2b1a2b", "#d070aa", "#159a80", "#5b88f5", "#84305f", "#7d9a3a")
"""Colors of the groups: contrast of 3 to white, and distinct under each kind of color blindness."""
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
"""Line styles within one chart, in order."""
MARKERS = ("o", "s", "^", "D", "v", "P")
"""Markers of groups with the same color, in order: of the first eight, the second eight and so on."""
TONES = ("#aab4c3", "#d5dae2", "#8a97aa")
"""Fills of adjacent phases."""
WIDTH, HEIGHT = 5.6, 2.9
"""Inches of 72 CSS pixels: about the size on the screen, so that text keeps its size."""
TEXT, GRID = "#5a5f69", "#dcdcd6"
SEED_CLASS = "seed"
"""Class of the lines of single seeds, for the style sheet."""
_METADATA = ("Date", "Creator", "Format", "Type")
"""Metadata entries that are left out of the file."""
_SETTINGS = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "axes.unicode_minus": True}


MOST_POINTS, MOST_POINTS_OF_A_SEED = 400, 120
"""Points of a mean over seeds and of one seed, which keep the page small."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    steps: Sequence[int]
    values: Sequence[float]
    """NaN leaves a gap."""
    color: int
    """Index of the group."""
    style: int = 0
    """Index of the line within its chart."""
    half_width: Sequence[float] = ()
    """That of the interval around the values, which are then smoothed already; empty: no band."""
    seeds: Sequence[tuple[Sequence[int], Sequence[float]]] = ()
    """Steps and smoothed values of single seeds, which the page shows on demand."""


def color_of(group: int) -> str:
    """Color of a group."""
    return COLORS[group % len(COLORS)]


def marker_of(group: int) -> str:
    """Marker of a group."""
    return MARKERS[group // len(COLORS) % len(MARKERS)]


def draw_curves(curves: Sequence[Curve], window: int, alt: str, *, percent: bool = False) -> str:
    """Draw raw values as thin lines and smoothed values as bold lines; with a window of 1, raw values with markers.

    A curve with a band is drawn as it is, with its seeds as lines of the class `seed`. The axis is logarithmic if
    positive values span three orders of magnitude; zero is marked if signs differ. Bands extend the axis by at most
    half of the range of the lines, since the interval of two seeds can be very wide.

    Args:
        curves: the lines to draw.
        window: steps of the moving average.
        alt: alternative text for screen readers.
        percent: whether values are fractions.
    """
    figure, axes = _axes(HEIGHT)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("step", color=TEXT, loc="right", labelpad=1)
    for curve in curves:
        line = dict(color=color_of(curve.color), linestyle=DASHES[curve.style % len(DASHES)])
        marked = window == 1 or curve.color >= len(COLORS)
        if marked:
            every = max(1, len(curve.steps) // 8) if window > 1 else 1
            line |= dict(marker=marker_of(curve.color), markersize=3 if window == 1 else 5, markevery=every)
        if curve.seeds:
            _draw_band(axes, curve, line, min(0.2, 0.8 / len(curves)))
        elif window > 1:
            axes.plot(curve.steps, curve.values, color=line["color"], linewidth=0.8, alpha=0.3)
            axes.plot(curve.steps, smooth(curve.values, window), linewidth=1.8, **line)
        else:
            axes.plot(curve.steps, curve.values, linewidth=1.6, **line)
    lines = [values for curve in curves for values in (curve.values, *(values for _, values in curve.seeds))]
    finite = [value for values in lines for value in values if not math.isnan(value)]
    if any(curve.seeds for curve in curves):
        _limit(axes, curves, min(finite), max(finite))
    _scale(axes, finite, percent)
    return _svg(figure, alt)


def _draw_band(axes: Axes, curve: Curve, line: dict[str, object], alpha: float) -> None:
    """Draw the mean over seeds with its interval, and the seeds."""
    keep = _thinned(len(curve.steps), MOST_POINTS)
    steps, mean, half = (np.array(part, dtype=float)[keep] for part in (curve.steps, curve.values, curve.half_width))
    axes.fill_between(steps, mean - half, mean + half, color=line["color"], alpha=alpha, linewidth=0)
    for seed_steps, values in curve.seeds:
        keep = _thinned(len(seed_steps), MOST_POINTS_OF_A_SEED)
        thin = dict(color=line["color"], linestyle=line["linestyle"], linewidth=0.8, alpha=0.7, gid=SEED_CLASS)
        axes.plot(np.array(seed_steps)[keep], np.array(values)[keep], **thin)
    axes.plot(steps, mean, linewidth=1.8, **line)


def _thinned(count: int, most: int) -> Int[np.ndarray, "_kept"]:
    """Indices of at most `most` evenly spaced points, the first and the last among them."""
    return np.linspace(0, count - 1, min(count, most)).round().astype(int)


def _limit(axes: Axes, curves: Sequence[Curve], low: float, high: float) -> None:
    """Set the value axis by the lines, with room for the bands."""
    room = 0.5 * (high - low) or abs(high) or 1.0
    bounds = [
        value + sign * half
        for curve in curves
        for value, half in zip(curve.values, curve.half_width or [math.nan] * len(curve.values), strict=True)
        for sign in (-1, 1)
        if not math.isnan(half)
    ]
    bottom, top = max(min([low, *bounds]), low - room), min(max([high, *bounds]), high + room)
    margin = 0.06 * (top - bottom) or abs(top) or 1.0
    axes.set_ylim(bottom - margin, top + margin)


def dash_of(run: int) -> int:
    """Index of the line style of a run in a histogram: colors repeat with other dashes."""
    return run // len(COLORS) % len(DASHES)


def draw_steps(bounds: Sequence[float], heights: Sequence[Sequence[float]], label: str, alt: str) -> str:
    """Draw histograms with common bounds as one outline per run.

    Args:
        bounds: bounds of the bins, one more than heights.
        heights: fractions in each bin, by run; empty: no line for this run.
        label: name of the axis.
        alt: alternative text for screen readers.
    """
    figure, axes = _axes(HEIGHT)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    for run, values in enumerate(heights):
        if values:
            axes.stairs(values, bounds, color=color_of(run), linestyle=DASHES[dash_of(run)], linewidth=1.6)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel(label, color=TEXT, loc="right", labelpad=1)
    return _svg(figure, alt)


def draw_bars(bars: Sequence[Sequence[float]], labels: Sequence[str], alt: str) -> str:
    """One horizontal bar per group, of segments with these labels where they fit.

    Args:
        bars: seconds of each segment, by group.
        labels: names of the segments.
        alt: alternative text for screen readers.
    """
    figure, axes = _axes(0.5 + 0.38 * len(bars))
    longest = max(map(sum, bars)) or 1.0
    for group, segments in enumerate(bars):
        axes.plot(
            [-0.012 * longest] * 2, [group - 0.32, group + 0.32], color=color_of(group), linewidth=5, clip_on=False
        )
        left = 0.0
        for number, (seconds, label) in enumerate(zip(segments, labels, strict=True)):
            axes.barh(group, seconds, left=left, height=0.7, color=TONES[number % len(TONES)])
            if 390 * seconds / longest > 6.5 * len(label):  # points of the axis and of a character
                axes.text(left + seconds / 2, group, label, ha="center", va="center", size=10, color="#1d1f23")
            left += seconds
    axes.set_xlim(-0.02 * longest, longest)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlabel("s", color=TEXT, loc="right", labelpad=1)
    return _svg(figure, alt)


def _scale(axes: Axes, values: Sequence[float], percent: bool) -> None:
    """Set the value axis; fractions stay between 0 and 1."""
    low, high = min(values), max(values)
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, -0.015 * (high - low)), min(top, 1 + 0.015 * (high - low)))
    elif low > 0 and high >= 1000 * low:
        axes.set_yscale("log")
        if not axes.get_autoscaley_on():
            axes.set_ylim(low / 2, high * 2)
    elif low < 0 < high:
        axes.axhline(0, color=TEXT, linewidth=0.7)


def _axes(height: float) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=TEXT, length=0)
    axes.margins(x=0.02, y=0.08)
    return figure, axes


def _svg(figure: Figure, alt: str) -> str:
    """The figure as an SVG element with ids that are unique on the page."""
    file = io.StringIO()
    salt = alt.encode(errors="replace").decode()
    with matplotlib.rc_context(_SETTINGS | {"svg.hashsalt": salt}):
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    text = re.sub(rf'<g id="{SEED_CLASS}"', f'<g class="{SEED_CLASS}"', file.getvalue())
    text = re.sub(r'(<g) id="[^"]*"', r"\1", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", path[0]), text)
    view = re.search(r'viewBox="[^"]*"', text)[0]
    inside = text[text.index(">", text.index("<svg")) + 1 :].replace("xlink:href", "href")
    return f'<svg {view} role="img" aria-label="{html.escape(alt)}">{inside}'
