"""Intervals of the report: against scipy, against enumerated and plain bootstraps, and their coverage."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_g2rl.report.intervals import (
    Interval,
    bootstrap_difference,
    mean_over_seeds,
    seed_difference,
    seed_interval,
    t_quantile,
)

pytestmark = pytest.mark.same_for_both


@pytest.mark.parametrize("degrees", [1, 1.5, 2, 4, 7.3, 34, 500])
def test_the_t_quantile_is_that_of_scipy(degrees):
    stats = pytest.importorskip("scipy.stats")
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-5)  # of the grid of angles


def test_means_over_seeds_have_the_t_intervals_of_scipy_and_skip_gaps():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).normal(size=(5, 40))
    values[1, 3] = values[2, 3] = math.nan
    values[1:, 7] = values[:, 9] = math.nan
    mean, half = mean_over_seeds(values)
    for step in (0, 3, 21):
        own = values[~np.isnan(values[:, step]), step]
        low, high = stats.t.interval(0.95, len(own) - 1, np.mean(own), stats.sem(own))
        assert [mean[step] - half[step], mean[step] + half[step]] == pytest.approx([low, high], rel=1e-6)
    assert mean[7] == values[0, 7] and math.isnan(half[7]) and math.isnan(mean[9]) and math.isnan(half[9])


def test_differences_are_paired_by_seed_if_two_seeds_are_shared_and_else_welchs():
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(1)
    own, other = draw.normal(1, 1, 6), draw.normal(0, 2, 6)
    by_seed = [{str(seed): value for seed, value in enumerate(values)} for values in (own, other)]
    found, expected = seed_difference(*by_seed), stats.ttest_rel(own, other).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert found.mean == pytest.approx(np.mean(own - other))
    with_gap = {**by_seed[0], "0": math.nan, "9": 100.0}
    assert seed_difference(with_gap, by_seed[1]).mean == pytest.approx(np.mean((own - other)[1:]))
    later = {f"{seed}x": value for seed, value in by_seed[1].items()}
    found, expected = seed_difference(by_seed[0], later), stats.ttest_ind(own, other, equal_var=False)
    expected = expected.confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-5)


def test_one_seed_has_a_difference_without_an_interval():
    assert not seed_interval({"0": 1.0}).is_known and seed_interval({"0": 1.0}).mean == 1.0
    for other in ({"0": 0.5}, {"1": 0.25, "2": 0.75}):
        difference = seed_difference({"0": 1.0}, other)
        assert difference.mean == 0.5 and not difference.is_known and not difference.excludes_zero
    assert math.isnan(seed_difference({"0": math.nan}, {"0": 1.0}).mean) and math.isnan(seed_interval({}).mean)
    same = seed_difference({"0": 1.0, "1": 1.0}, {"2": 0.5, "3": 0.5})
    assert same == Interval(0.5, 0.5, 0.5) and same.excludes_zero


def test_the_bootstrap_of_one_seed_is_that_over_all_selections_of_problems():
    own, other = np.array([[1.0, 0.5, 0.25, 0.0, 0.75]]), np.array([[0.3, 0.7, 0.1, 0.2, 0.6]])
    selections = list(itertools.product(range(5), repeat=5))
    means = [np.mean((own - other)[0, list(selection)]) for selection in selections]
    found = bootstrap_difference(own, other, paired=False)
    assert found.mean == pytest.approx(np.mean(own - other))
    # 2,000 samples: the standard error of a tail probability of 2.5% is 0.35%.
    assert np.quantile(means, 0.012) <= found.low <= np.quantile(means, 0.04)
    assert np.quantile(means, 0.96) <= found.high <= np.quantile(means, 0.988)


def test_without_differences_between_problems_the_bootstrap_is_about_the_t_interval():
    own = np.random.default_rng(2).normal(size=(8, 1)) + np.zeros((8, 30))
    found = bootstrap_difference(own, np.zeros((8, 30)), paired=True)
    t = seed_interval({str(seed): value for seed, value in enumerate(own[:, 0])})
    assert found.mean == pytest.approx(t.mean)
    assert found.half_width == pytest.approx(t.half_width, rel=0.08)  # eight seeds resampled are not quite normal


def test_what_two_settings_have_in_common_does_not_widen_a_paired_interval():
    draw = np.random.default_rng(3)
    common = draw.normal(size=(5, 1)) + draw.normal(size=(1, 30))
    paired = bootstrap_difference(common + 0.25, common, paired=True)
    assert (paired.low, paired.high) == pytest.approx((0.25, 0.25))
    by_problem = bootstrap_difference(common + 0.25, common, paired=False)
    assert by_problem.half_width > 0.3  # of the seeds; problems are the same on both sides
    assert bootstrap_difference(common[:1] + 0.25, common[:1], paired=False).half_width == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("of_seeds", [0.0, 1.0])
def test_intervals_over_seeds_and_problems_cover_the_true_difference(of_seeds):
    """Crossed effects of 5 seeds and 20 problems; plain percentiles would cover about 84% if only seeds varied."""
    draw, covered, trials = np.random.default_rng(4), 0, 100
    for _ in range(trials):
        effects = of_seeds * draw.normal(size=(5, 1)) + draw.normal(size=(1, 20)) + 0.5 * draw.normal(size=(5, 20))
        interval = bootstrap_difference(effects, np.zeros((5, 20)), paired=True)
        covered += interval.low <= 0 <= interval.high
    assert 0.88 <= covered / trials  # three standard errors of 2.2% below 95%
