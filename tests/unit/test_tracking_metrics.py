"""The spread of the gradient cosines of a step, against numpy over plainly normalised vectors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megatron_g2rl.config.tree import ExplorationConfig
from megatron_g2rl.records import Response
from megatron_g2rl.tracking.metrics import cosine_quantiles, prior_metrics
from megatron_g2rl.tracking.table import unknown_names


def testcosine_quantiles_are_those_of_all_pairs_inside_groups():
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
