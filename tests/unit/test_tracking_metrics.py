"""The spread of the gradient cosines of a step, against numpy over plainly normalised vectors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from megatron_g2rl.tracking.metrics import cosine_quantiles


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
