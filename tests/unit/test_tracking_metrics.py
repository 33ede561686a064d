"""The spread of the gradient cosines of a step, against numpy over plainly normalized vectors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megatron_g2rl.config.sections.method import ExplorationConfig
from megatron_g2rl.records import Experience, Prompt, Response, ResponseGroup, TokenStatistics
from megatron_g2rl.tracking.metrics import (
    _health_metrics,
    cosine_quantiles,
    distinct_correct,
    duplicate_correlation,
    entropy_pressure,
    prior_metrics,
)
from megatron_g2rl.tracking.table import unknown_names


def test_cosine_quantiles_are_those_of_all_pairs_inside_groups():
    groups = [torch.randn(n, 7, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 8)]
    cosines = []
    for features in groups:
        unit = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=1, keepdims=True)
        cosines += [float(a @ b) for a, b in itertools.combinations(unit, 2)]
    found = cosine_quantiles([*groups, torch.zeros(4, 7)])  # responses without a feature are excluded
    expected = np.quantile(cosines, [0.1, 0.5, 0.9])
    names = ["geometry/cosine_p10", "geometry/cosine_median", "geometry/cosine_p90"]
    assert [found[name] for name in names] == pytest.approx(expected, abs=1e-5)


def test_without_pairs_there_are_no_quantiles():
    assert cosine_quantiles([torch.zeros(3, 4), torch.ones(1, 4)]) == {}


def test_tokens_whose_reported_logprob_is_off_by_more_than_the_tolerance_are_counted():
    responses = [Response((1, 2, 3), (-1.0, -2.0, float("nan")), "", "stop", 0), Response((4,), (-3.0,), "", "stop", 1)]
    old = [torch.tensor([-1.0, -2.05, -1.0]), torch.tensor([-3.0005])]
    for tolerance, expected in ((0.1, 0.25), (0.01, 0.5), (1e-4, 0.75)):
        found = prior_metrics(responses, old, tolerance)
        assert found == {"exploration/swept_again_fraction": expected} and not unknown_names(found)
    assert prior_metrics(responses, old, 0.0) == {}


def test_the_tolerance_of_the_prior_follows_the_precision_unless_it_is_set():
    assert ExplorationConfig().prior_tolerance_in("fp32") < ExplorationConfig().prior_tolerance_in("bf16")
    for value in (0.0, 0.3):
        assert ExplorationConfig(prior_tolerance=value).prior_tolerance_in("bf16") == value
    assert ExplorationConfig(source="sampler_topk").prior_tolerance_in("fp32") == 0
    assert ExplorationConfig(method="none", measure_geometry=False).prior_tolerance_in("fp32") == 0


def test_health_counts_boxes_loops_and_confident_incorrect_answers():
    texts = [["\\boxed{1}", "\\boxed{1}", "\\boxed{2}"], ["\\boxed{3}", "\\boxed{3}", "no box"]]
    tokens = [[[1, 2, 3], [5] * 40, list(range(40))], [[7, 8] * 16, [7, 8] * 15, [9]]]
    groups = tuple(
        ResponseGroup(
            Prompt(i, "", (1,), "3"),
            tuple(
                Response(tuple(ids), (0.0,) * len(ids), text, "stop", 0)
                for text, ids in zip(texts[i], tokens[i], strict=True)
            ),
        )
        for i in range(2)
    )
    correct = torch.tensor([False, False, False, True, True, False])
    rewards = torch.zeros(6)
    found = _health_metrics(Experience(groups, rewards, correct, rewards, rewards, correct))
    assert found == {
        "response/unparsed_fraction": 1 / 6,
        "response/repetitive_fraction": 2 / 6,  # 30 tokens are too few
        "response/confidently_incorrect_fraction": 1 / 2,  # two of three say 1; the majority of the second is correct
    }


def step_of(texts: list[list[str]], **columns) -> Experience:
    """A step of groups with these texts and columns."""
    groups = tuple(
        ResponseGroup(Prompt(i, "", (1,), ""), tuple(Response((1,), (0.0,), text, "stop", 0) for text in group))
        for i, group in enumerate(texts)
    )
    zeros = torch.zeros(sum(map(len, texts)))
    defaults = dict(rewards=zeros, correct=zeros.bool(), shaped=zeros, advantages=zeros, kept=zeros.bool())
    return Experience(groups, **(defaults | columns))


def test_distinct_correct_solutions_are_counted_in_groups_whose_reward_has_forms():
    texts = [["a", "b", "c", "d"], ["a", "b"], ["a", "b"]]
    forms = ("x", "x", "y", "", "", "", None, None)  # two forms; no correct response; a task without forms
    step = step_of(texts, forms=forms)
    assert distinct_correct(step) == {"response/distinct_correct": 1.0} and not unknown_names(distinct_correct(step))
    assert distinct_correct(step_of(texts)) == {}
    assert step.joined(step_of([["a"]])).forms == (*forms, None)
    assert step_of([["a"]]).joined(step_of([["a"]])).forms is None


def test_novelty_that_falls_with_the_number_of_copies_is_correlated_with_it():
    texts = [["a", "a", "a", "b"], ["c", "c", "d", "a"]]
    copies = [3, 3, 3, 1, 2, 2, 1, 1]  # counted within a group
    novelty = torch.tensor([0.1, 0.2, 0.0, 0.9, 0.5, 0.4, 0.8, 1.0])
    found = duplicate_correlation(step_of(texts, novelty=novelty))
    assert found == {"exploration/duplicate_correlation": pytest.approx(np.corrcoef(copies, novelty)[0, 1], abs=1e-6)}
    assert found["exploration/duplicate_correlation"] < -0.9 and not unknown_names(found)
    assert duplicate_correlation(step_of([["a", "b"]], novelty=novelty[:2])) == {}


def test_the_pressure_on_the_entropy_is_the_covariance_of_advantage_and_logprob_by_kind_of_group():
    texts = [["a", "b", "c"], ["a", "b"], ["a", "b"], ["a"]]
    correct = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1]).bool()
    advantages = torch.tensor([1.0, -0.5, -0.5, 0.3, -0.3, 0.0, 0.0, 0.0])
    logprobs = [[-1.0, -2.0], [-5.0], [-4.0], [-1.0], [-3.0], [-9.0], [-1.0], [-2.0]]
    old = TokenStatistics(tuple(map(torch.tensor, logprobs)), ())
    found = entropy_pressure(step_of(texts, correct=correct, advantages=advantages), old)
    mixed = np.cov([1.0, -0.5, -0.5], [-3.0, -5.0, -4.0], bias=True)[0, 1]
    assert found == {
        "exploration/covariance_mixed": pytest.approx(mixed),
        "exploration/covariance_all_correct": pytest.approx(0.3),  # the probable response is favored
        "exploration/covariance_all_incorrect": 0.0,
    }
    assert not unknown_names(found)
