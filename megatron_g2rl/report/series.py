"""Statistics of one metric over the steps of a run: smoothing, and the numbers for tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

TAIL = 10
"""Number of final steps of a run that are averaged."""


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
class Numbers:
    """Statistics of a series; NaN if it has no values."""

    first: float
    last: float
    lowest: float
    lowest_step: int
    highest: float
    highest_step: int
    tail_mean: float
    """Mean of the last ten steps with a value."""
    tail_deviation: float
    """Standard deviation over these steps: variation from step to step, not between seeds."""


def numbers(steps: Sequence[int], values: Sequence[float]) -> Numbers:
    """First, last, extremes and tail of a series; of equal extremes, the earliest step counts."""
    present = [(value, step) for step, value in zip(steps, values, strict=True) if not math.isnan(value)]
    if not present:
        nan = math.nan
        return Numbers(nan, nan, nan, -1, nan, -1, nan, nan)
    tail = [value for value, _ in present[-TAIL:]]
    low, high = min(present), max(present, key=lambda pair: (pair[0], -pair[1]))
    return Numbers(present[0][0], present[-1][0], *low, *high, fmean(tail), pstdev(tail))


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
