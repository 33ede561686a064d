"""Numbers of one metric over the steps of a run: smoothing, and the few that stand in tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

TAIL = 10
"""Steps at the end of a run over which its last values are averaged."""


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the numbers among the `window` steps around each one, fewer at both ends; NaN where there is none."""
    half = window // 2
    around = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [mean(part) for part in around]


def smoothing_window(steps: int) -> int:
    """Odd number of steps, about a tenth of the run and at most 51; 1 (no smoothing) below ten steps."""
    return 1 if steps < 10 else min(51, 2 * round(steps / 20) + 1)


def mean(values: Sequence[float]) -> float:
    """Mean of the numbers that are there, NaN when there are none."""
    present = [value for value in values if not math.isnan(value)]
    return fmean(present) if present else math.nan


@dataclass(frozen=True)
class Numbers:
    """What a table says about a series; NaN where it holds no number."""

    first: float
    last: float
    lowest: float
    lowest_step: int
    highest: float
    highest_step: int
    tail_mean: float
    """Mean of the last ten steps that have a number."""
    tail_deviation: float
    """Standard deviation of those steps among themselves: scatter from step to step, not between seeds."""


def numbers(steps: Sequence[int], values: Sequence[float]) -> Numbers:
    """First, last, extremes and the end of a series; the steps of the extremes are the earliest ones."""
    present = [(value, step) for step, value in zip(steps, values, strict=True) if not math.isnan(value)]
    if not present:
        nan = math.nan
        return Numbers(nan, nan, nan, -1, nan, -1, nan, nan)
    tail = [value for value, _ in present[-TAIL:]]
    low, high = min(present), max(present, key=lambda pair: (pair[0], -pair[1]))
    return Numbers(present[0][0], present[-1][0], *low, *high, fmean(tail), pstdev(tail))


def show(value: float, percent: bool = False) -> str:
    """A number for a person: percent with one decimal, else three digits that count; a dash where there is none."""
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
