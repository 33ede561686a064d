"""Metrics of an evaluation against brute force and textbook formulas."""

from __future__ import annotations

import random
from itertools import combinations
from math import sqrt
from statistics import fmean, stdev

import pytest

from megatron_g2rl.evaluation import summary
from megatron_g2rl.evaluation.summary import Evaluation, ends_in_loop, intervals, is_confidently_incorrect
from megatron_g2rl.records import Prompt, Response, ResponseGroup


def respond(text: str, tokens=(1, 2, 3), finish="stop") -> Response:
    return Response(tuple(tokens), (0.0,) * len(tokens), text, finish, 0)


def make_evaluation(rows: list[list[tuple[str, bool]]]) -> Evaluation:
    groups = [
        ResponseGroup(
            Prompt(i, "", (1,), ""), tuple(respond(f"\\boxed{{{answer}}}" if answer else "") for answer, _ in row)
        )
        for i, row in enumerate(rows)
    ]
    return Evaluation.of(groups, [flag for row in rows for _, flag in row])


ROWS = [
    [("1", True), ("2", False), ("2", False), ("1", True), ("1", True), ("", False)],
    [("5", False), ("5", False), ("5", False), ("5", False), ("4", True), ("", False)],
    [("", False)] * 6,
    [("7", True)] * 6,
]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_pass_at_k_over_problems_is_the_mean_over_all_draws(k):
    found = make_evaluation(ROWS).metrics([f"pass@{k}"])
    expected = fmean(fmean(any(flag for _, flag in draw) for draw in combinations(row, k)) for row in ROWS)
    assert found[f"pass_at_{k}"] == pytest.approx(expected)


def test_the_accuracies_and_the_health_of_known_responses():
    found = make_evaluation(ROWS).metrics(["mean@6", "maj@6", "maj@3"])
    assert found["mean_at_6"] == pytest.approx((3 / 6 + 1 / 6 + 0 + 1) / 4)
    assert found["maj_at_6"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    # votes of three: 2 2 beats 1, 1 1 beats none; 5 5 5, 5 beats 4 only by a tie
    assert found["maj_at_3"] == pytest.approx(((0 + 1) / 2 + (0 + 0.5) / 2 + 0 + 1) / 4)
    assert found["unparsed_fraction"] == pytest.approx(8 / 24)
    assert found["confidently_incorrect_fraction"] == 1 / 4


def test_distinct_correct_solutions_are_counted_with_every_pass_at_k_and_are_one_vote_each():
    forms = [["x", "x", "y", ""], ["", "", "", ""], [None] * 4]
    rows = [[("1", True), ("2", True), ("3", True), ("3", False)], [("5", False)] * 4, [("7", True)] * 4]
    without = make_evaluation(rows)
    groups, correct = without.groups, [flag for row in rows for _, flag in row]
    found = Evaluation.of(groups, correct, forms=[form for row in forms for form in row])
    metrics = found.metrics(["pass@1", "pass@2", "pass@4", "maj@4"])
    for k in (2, 4):
        expected = fmean(fmean(len(set(draw) - {"", None}) for draw in combinations(row, k)) for row in forms)
        assert metrics[f"distinct_correct_at_{k}"] == pytest.approx(expected)
    assert "distinct_correct_at_1" not in metrics and "distinct_correct_at_2" not in without.metrics(["pass@2"])
    # two responses of one form outvote others with different answers
    assert found.per_problem(["maj@4"])["maj_at_4"] == [1.0, 0.0, 1.0]
    assert without.per_problem(["maj@4"])["maj_at_4"][0] == 0.5  # 3 and 3, of which one is correct
    assert set(found.per_problem(["pass@2"])) >= {"distinct_correct_at_2"}


def test_per_problem_values_average_to_the_metrics():
    evaluation = make_evaluation(ROWS)
    metrics = evaluation.metrics(["pass@1", "pass@6", "maj@6"])
    for name, values in evaluation.per_problem(["pass@1", "pass@6", "maj@6"]).items():
        assert len(values) == 4 and fmean(values) == pytest.approx(metrics[name])


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        ("aab", "001", True),
        ("aabb", "0000", False),  # a tie is no majority
        ("aab", "110", False),
        ("aa-", "000", True),
        ("aa---", "00000", False),  # two of five
        ("---", "000", False),
        ("a", "0", False),  # one response agrees with nobody
    ],
)
def test_a_confidently_incorrect_problem_has_an_incorrect_answer_in_more_than_half_of_its_responses(
    answers, correct, expected
):
    given = [None if a == "-" else a for a in answers]
    assert is_confidently_incorrect(given, [c == "1" for c in correct]) == expected


def loops_by_brute_force(tokens: list[int]) -> bool:
    for period in range(1, summary.LONGEST_PERIOD + 1):
        for copies in range(summary.LOOP_COPIES, len(tokens) // period + 1):
            if copies * period >= summary.LOOP_TOKENS:
                end = tokens[len(tokens) - copies * period :]
                if end == end[:period] * copies:
                    return True
    return False


def test_loops_at_the_end_are_found_as_by_trying_every_period_and_number_of_copies():
    draws, found = random.Random(0), []
    for _ in range(600):
        start = draws.choices(range(3), k=draws.randrange(40))
        period = draws.choices(range(draws.choice([2, 50])), k=draws.randrange(1, 20))
        tokens = start + period * draws.randrange(1, 8) + draws.choices(range(3), k=draws.choice([0, 0, 1]))
        found.append(ends_in_loop(tokens))
        assert found[-1] == loops_by_brute_force(tokens), tokens
    assert 100 < sum(found) < 500
    long = list(range(600)) * 3
    assert not ends_in_loop(long) and not ends_in_loop(list(range(600)) * 5)  # the period is over the limit
    assert ends_in_loop(list(range(500)) * 5)


def test_bootstrap_intervals_agree_with_the_normal_approximation_and_are_reproducible():
    draws = random.Random(1)
    values = {"pass": [draws.random() for _ in range(400)], "maj": [float(draws.random() < 0.3) for _ in range(400)]}
    found = intervals(values)
    assert found == intervals(values)
    for name, column in values.items():
        half = 1.96 * stdev(column) / sqrt(len(column))
        # the percentiles of 2000 samples have a standard error of about 4% of the half width
        assert found[name][0] == pytest.approx(fmean(column) - half, abs=0.2 * half)
        assert found[name][1] == pytest.approx(fmean(column) + half, abs=0.2 * half)


def test_the_interval_of_few_problems_is_that_of_all_possible_samples():
    values = [0.0, 0.25, 1.0]
    means = sorted(fmean(draw) for draw in [(a, b, c) for a in values for b in values for c in values])
    low, high = intervals({"pass": values})["pass"]
    # 27 samples of equal probability, of which the extreme ones have 1/27 = 3.7%: both are outside 2.5%
    assert (low, high) == (means[0], means[-1])
    assert intervals({"pass": [0.5]})["pass"] == (0.5, 0.5)
