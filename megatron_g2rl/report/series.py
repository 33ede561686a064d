"""Statistics of one metric over the steps of runs: smoothing, bands over seeds, and values at the start and the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from megatron_g2rl.report.intervals import mean_over_seeds
from megatron_g2rl.report.runs import EVALUATION, Run

TAIL = 10
"""Number of steps at the start and the end of a run that are averaged, if it is long enough."""


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centered moving average over `window` steps, fewer at both ends; NaN values are skipped."""
    half = window // 2
    around = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [mean(part) for part in around]


def smoothing_window(steps: int) -> int:
    """Odd number of steps, about a tenth of the run and at most 51; 1 (no smoothing) for fewer than ten steps."""
    return 1 if steps < 10 else min(51, 2 * round(steps / 20) + 1)


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    present = [value for value in values if not math.isnan(value)]
    return fmean(present) if present else math.nan


@dataclass(frozen=True)
class Band:
    """A metric of several seeds over the steps."""

    steps: list[int]
    mean: list[float]
    """Mean over the seeds of their smoothed values; NaN where no seed has one."""
    half_width: list[float]
    """That of the 95% t interval of the mean; NaN where fewer than two seeds have a value."""
    members: list[tuple[list[int], list[float]]]
    """Steps and smoothed values of each run, over all of its steps."""


def seed_band(runs: Sequence[Run], name: str, window: int) -> Band:
    """The band of the runs of one setting, over the steps between the latest first and the earliest last one.

    Beyond these steps some seeds are missing, and a mean over the others would jump.

    Args:
        runs: one run per seed; those without the metric are skipped.
        name: the metric.
        window: steps of the moving average.
    """
    members = []
    for run in runs:
        steps, values = run.series(name)
        if any(not math.isnan(value) for value in values):
            members.append((steps, smooth(values, window)))
    if not members:
        return Band([], [], [], [])
    first, last = max(steps[0] for steps, _ in members), min(steps[-1] for steps, _ in members)
    common = sorted({step for steps, _ in members for step in steps if first <= step <= last})
    values = [dict(zip(*member, strict=True)) for member in members]
    mean, half = mean_over_seeds(np.array([[each.get(step, math.nan) for step in common] for each in values]))
    return Band(common, mean.tolist(), half.tolist(), members)


def compared_steps(runs: Sequence[Run], name: str = "") -> list[int]:
    """Steps that all runs have, of those that have any; for an evaluation metric, its evaluated steps."""
    steps = [set(run.series(name)[0]) for run in runs]
    return sorted(set.intersection(*filter(None, steps))) if any(steps) else []


def averaged(steps: int) -> int:
    """Number of steps averaged at the start and at the end, of `steps` compared ones: at most half of them."""
    return max(1, min(TAIL, steps // 2))


def start_and_end(runs: Sequence[Run], name: str) -> list[tuple[float, float]]:
    """Mean over the first and over the last compared steps of each run; NaN for a run without the metric.

    Evaluations are not averaged. Runs without a common step are described by their own first and last steps.
    """
    common = compared_steps(runs, name)
    pairs = []
    for run in runs:
        value_of = dict(zip(*run.series(name), strict=True))
        steps = common or list(value_of)
        count = 1 if name.startswith(EVALUATION) else averaged(len(steps))
        start, end = ([value_of.get(step, math.nan) for step in part] for part in (steps[:count], steps[-count:]))
        pairs.append((mean(start), mean(end)))
    return pairs


def mean_change(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean over the seeds of a setting of the values at the start and at the end."""
    return mean([start for start, _ in pairs]), mean([end for _, end in pairs])


def show(value: float, percent: bool = False) -> str:
    """Format a number: percent with one decimal, else three significant digits; a dash for NaN."""
    if math.isnan(value):
        return "\N{EN DASH}"
    if percent:
        return f"{100 * value:.1f}%".replace("-", "\N{MINUS SIGN}")
    if value and not 1e-3 <= abs(value) < 1e7:
        text = f"{value:.1e}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def show_spread(mean: float, half_width: float, percent: bool = False) -> str:
    """A mean ± half of its interval, with the digits that the interval supports; the mean alone without an interval."""
    if math.isnan(half_width):
        return show(mean, percent)
    if percent:
        return f"{show(mean, percent)} ± {show(half_width, percent)}"
    return f"{show_to(mean, half_width)} ± {show_to(half_width, half_width)}"


def show_to(value: float, scale: float, sign: str = "") -> str:
    """Format a number with the decimals of two significant digits of `scale`; "+" as `sign` marks positive ones."""
    places = 1 - math.floor(math.log10(scale)) if scale > 0 else 99
    if math.isnan(value) or places > 6:
        text = show(value)
        return sign + text if sign and value > 0 else text
    text = f"{value:{sign},.{max(0, places)}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def show_change(pair: tuple[float, float], percent: bool) -> str:
    """Start and end with an arrow, or one number if both are shown alike."""
    start, end = (show(value, percent) for value in pair)
    return start if start == end else f"{start} → {end}"
