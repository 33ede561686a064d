"""95% intervals: of means over seeds, of differences between settings, and of differences over seeds and problems.

Over seeds alone, t intervals: percentiles of a bootstrap of five seeds cover far less than 95%. Over seeds and
problems, a bootstrap that resamples both, with the spread over seeds expanded so that it agrees with the t interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float

CONFIDENCE = 0.95
RESAMPLES = 2000
"""Samples of a bootstrap."""
_BLOCK = 100
"""Samples that are in memory together."""
_ANGLES = np.linspace(0, math.pi / 2, 20_001)
_NORMAL = 1.959964
"""97.5% quantile of the normal distribution."""


@dataclass(frozen=True)
class Interval:
    """A number with the bounds of its interval; NaN bounds if the data has no spread to estimate them from."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    @property
    def is_known(self) -> bool:
        """Whether there are bounds."""
        return not math.isnan(self.low)

    @property
    def half_width(self) -> float:
        """Half of the width; NaN without bounds."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether both bounds are on one side of zero."""
        return self.low > 0 or self.high < 0


@cache
def t_quantile(degrees: float) -> float:
    """Half-width of the central 95% of Student's t distribution with these degrees of freedom.

    With t = sqrt(degrees) tan(angle), the density is proportional to cos(angle) ** (degrees - 1).
    """
    density = np.cos(_ANGLES) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(degrees) * math.tan(float(np.interp(CONFIDENCE, below / below[-1], _ANGLES)))


def mean_over_seeds(
    values: Float[np.ndarray, "seeds *rest"],
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Mean over the first axis and half-width of its t interval; NaN values are skipped.

    The mean is NaN where every seed is NaN, and the half-width where fewer than two seeds are not.
    """
    values = np.asarray(values, dtype=float)
    present = ~np.isnan(values)
    count = present.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(present, values, 0.0).sum(axis=0) / count
        spread = np.sqrt((np.where(present, values - mean, 0.0) ** 2).sum(axis=0) / (count - 1))
        quantile = np.array([math.nan, math.nan, *(t_quantile(n - 1) for n in range(2, len(values) + 1))])[count]
        return mean, np.where(count > 1, quantile * spread / np.sqrt(count), math.nan)


def seed_interval(values: Mapping[str, float]) -> Interval:
    """The mean over seeds with its t interval.

    Args:
        values: a number by seed; NaN ones are skipped.
    """
    mean, half = mean_over_seeds(np.array(list(values.values()) or [math.nan]))
    return Interval(float(mean), float(mean - half), float(mean + half))


def seed_difference(own: Mapping[str, float], other: Mapping[str, float]) -> Interval:
    """The difference `own` - `other` of two settings with its t interval.

    Paired by seed over the seeds that both have, if these are at least two; else the difference of the two means, with
    Welch's interval if both have at least two seeds.

    Args:
        own: a number by seed; NaN ones are skipped.
        other: that of the other setting.
    """
    own, other = ({seed: value for seed, value in side.items() if not math.isnan(value)} for side in (own, other))
    shared = own.keys() & other.keys()
    if len(shared) > 1:
        return seed_interval({seed: own[seed] - other[seed] for seed in shared})
    if not own or not other:
        return Interval(math.nan)
    sides = [np.array(list(side.values())) for side in (own, other)]
    difference = float(sides[0].mean() - sides[1].mean())
    if min(map(len, sides)) < 2:
        return Interval(difference)
    errors = [float(side.var(ddof=1)) / len(side) for side in sides]
    if not sum(errors):
        return Interval(difference, difference, difference)
    degrees = sum(errors) ** 2 / sum(error**2 / (len(side) - 1) for error, side in zip(errors, sides, strict=True))
    half = t_quantile(degrees) * math.sqrt(sum(errors))
    return Interval(difference, difference - half, difference + half)


def bootstrap_difference(
    own: Float[np.ndarray, "seeds problems"], other: Float[np.ndarray, "other_seeds problems"], *, paired: bool
) -> Interval:
    """The difference of the means of `own` and `other` over seeds and problems, with its percentile interval.

    Each sample draws problems, the same ones for both sides, and seeds. A side with one seed adds no spread of seeds.
    The deviations of n seeds are scaled by t sqrt(n / (n - 1)) / 1.96, like the expanded percentile interval of
    Hesterberg (2015, doi:10.1080/00031305.2015.1089789), since a bootstrap of few seeds is too narrow.

    Args:
        own: accuracies by seed and problem.
        other: those of the other setting, of the same problems.
        paired: whether the rows of both are the same seeds, which are then drawn together.
    """
    if paired:
        own, other = own - other, np.zeros((1, own.shape[1]))
    draw = np.random.default_rng(0)
    difference = float(own.mean() - other.mean())
    own, other = _expanded(own), _expanded(other)
    samples = []
    for _ in range(RESAMPLES // _BLOCK):
        problems = _weights(draw, own.shape[1])
        sides = [((_weights(draw, len(side)) @ side) * problems).sum(axis=1) for side in (own, other)]
        samples.append(sides[0] - sides[1])
    low, high = np.quantile(np.concatenate(samples), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(difference, float(low), float(high))


def _weights(draw: np.random.Generator, count: int) -> Float[np.ndarray, "block count"]:
    """How often each of `count` things is drawn, as a fraction."""
    return draw.multinomial(count, np.full(count, 1 / count), _BLOCK) / count


def _expanded(values: Float[np.ndarray, "seeds problems"]) -> Float[np.ndarray, "seeds problems"]:
    """The values with the deviations of the means of seeds scaled."""
    seeds = len(values)
    if seeds == 1:
        return values
    factor = t_quantile(seeds - 1) * math.sqrt(seeds / (seeds - 1)) / _NORMAL
    return values + (factor - 1) * (values.mean(axis=1, keepdims=True) - values.mean())
