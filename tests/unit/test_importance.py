"""Importance weights between rollout engine and trainer, and the metrics of their mismatch."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_g2rl.algorithm import importance_weights, rollout_mismatch, truncated_importance_weights

# float64 arithmetic of a few operations on numbers of order one
EXACT = {"rtol": 0, "atol": 1e-14}


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_importance_weights_are_truncated_ratios_of_trainer_to_rollout_engine():
    old, rollout = double([0, 0, 0, math.nan]), double([math.log(2), -math.log(1.5), -math.log(9), math.nan])
    mask = torch.tensor([[True, True, True, False]])
    weights = truncated_importance_weights(old.requires_grad_(), rollout, mask, cap=2.0)
    torch.testing.assert_close(weights, double([0.5, 1.5, 2.0, 1.0]), **EXACT)
    assert not weights.requires_grad


LOGS = [[math.log(2), math.log(3), math.nan], [math.log(0.5), 0.0, math.log(0.5)], [0.0, math.nan, math.nan]]
"""log(trainer / rollout engine) of the tokens of three responses: their products are 6, 1/4 and 1."""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(cap=2.0), [[2, 2, 1], [0.5, 1, 0.5], [1, 1, 1]]),
        (dict(cap=2.0, level="sequence"), [[2, 2, 2], [0.25, 0.25, 0.25], [1, 1, 1]]),
        (dict(cap=8.0, level="sequence", bounds=(0.5, 10.0)), [[6, 6, 6], [0, 0, 0], [1, 1, 1]]),
        (dict(cap=2.0, bounds=(0.2, 5.0)), [[0, 0, 0], [0.5, 1, 0.5], [1, 1, 1]]),
        (dict(cap=None, bounds=(0.5, 5.0)), [[0, 0, 0], [0, 0, 0], [1, 1, 1]]),
        (dict(cap=None), [[1, 1, 1], [1, 1, 1], [1, 1, 1]]),
    ],
)
def test_weights_of_tokens_or_of_responses_and_rejected_responses(options, expected):
    ratio = torch.tensor(LOGS, dtype=torch.float64)
    old = torch.full_like(ratio, -3.0).requires_grad_()
    weights = importance_weights(old, old.detach() - ratio, ~ratio.isnan(), **options)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), **EXACT)
    assert not weights.requires_grad


def test_an_infinite_log_prob_is_not_hidden_by_a_rejection():
    old = double([-math.inf, -1.0])
    weights = importance_weights(old, torch.zeros_like(old), torch.ones_like(old).bool(), cap=None, bounds=(0.5, 2.0))
    assert torch.equal(weights, torch.ones_like(weights))  # the ratio of the loss is NaN there
    weights = importance_weights(old, torch.zeros_like(old), torch.ones_like(old).bool(), cap=2.0, level="sequence")
    assert weights.isnan().all()


def test_mismatch_of_rollout_engine_and_trainer_is_measured_on_response_tokens():
    old, rollout = double([0, 0, math.nan]), double([math.log(2), -math.log(9), 5.0])
    metrics = rollout_mismatch(old, rollout, torch.tensor([[True, True, False]]), cap=2.0)
    assert metrics["logprob_difference_mean"].item() == pytest.approx((math.log(2) + math.log(9)) / 2)
    assert metrics["logprob_difference_max"].item() == pytest.approx(math.log(9))
    # k3 of rollout || trainer: (trainer/rollout) - 1 - log(trainer/rollout) at ratios 1/2 and 9
    assert metrics["kl"].item() == pytest.approx(((0.5 - 1 + math.log(2)) + (9 - 1 - math.log(9))) / 2)
    assert metrics["truncated_fraction"].item() == 0.5


def test_weights_are_one_where_rollout_engine_and_trainer_agree():
    logprobs = torch.randn(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(truncated_importance_weights(logprobs, logprobs, mask, cap=2.0), torch.ones(3, 4))
    assert all(value == 0 for value in rollout_mismatch(logprobs, logprobs, mask, cap=2.0).values())


def test_without_tokens_there_is_no_mismatch():
    for shape in ((0, 4), (3, 0), (3, 4)):
        nothing, mask = torch.full(shape, torch.nan), torch.zeros(shape, dtype=torch.bool)
        assert all(value == 0 for value in rollout_mismatch(nothing, nothing, mask, cap=2.0).values())


@pytest.mark.usefixtures("unchecked_shapes")
def test_tensors_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 4\], \[3, 5\] and \[3, 4\]"):
        truncated_importance_weights(torch.zeros(3, 4), torch.zeros(3, 5), torch.ones(3, 4), cap=2.0)
