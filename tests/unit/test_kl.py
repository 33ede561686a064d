"""The KL estimators k1, k2 and k3, with the bounds of docs/method.md, section 4."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from megatron_g2rl.algorithm import KL_ESTIMATORS, kl_penalty


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_each_estimator_matches_a_worked_example():
    # the policy's probability of the token is twice the reference's
    logprobs, reference = double(math.log(0.5)), double(math.log(0.25))
    assert kl_penalty(logprobs, reference, "k1").item() == pytest.approx(math.log(2), abs=1e-15)
    assert kl_penalty(logprobs, reference, "k2").item() == pytest.approx(math.log(2) ** 2 / 2, abs=1e-15)
    assert kl_penalty(logprobs, reference, "k3").item() == pytest.approx(0.5 - 1 + math.log(2), abs=1e-15)


def test_k3_is_the_default():
    logprobs, reference = double(-1.0, -2.0), double(-2.0, -0.5)
    torch.testing.assert_close(kl_penalty(logprobs, reference), kl_penalty(logprobs, reference, "k3"), rtol=0, atol=0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_unbiased_estimators_have_the_kl_of_torch_as_expectation(estimator):
    draw = torch.Generator().manual_seed(1)
    policy = Categorical(logits=torch.randn(5, dtype=torch.float64, generator=draw))
    reference = Categorical(logits=torch.randn(5, dtype=torch.float64, generator=draw))
    estimates = kl_penalty(policy.logits, reference.logits, estimator)
    torch.testing.assert_close((policy.probs * estimates).sum(), kl_divergence(policy, reference), rtol=0, atol=1e-14)


def test_k2_agrees_with_the_kl_to_second_order():
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(5, dtype=torch.float64, generator=draw)
    policy = Categorical(logits=logits)
    reference = Categorical(logits=logits + 1e-3 * torch.randn(5, dtype=torch.float64, generator=draw))
    expected = kl_divergence(policy, reference)
    # the next order is 1e-3 times smaller than the estimate itself
    estimate = (policy.probs * kl_penalty(policy.logits, reference.logits, "k2")).sum()
    torch.testing.assert_close(estimate, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_gradients_to_both_arguments_equal_finite_differences(estimator):
    draw = torch.Generator().manual_seed(3)
    logprobs = torch.randn(4, 3, dtype=torch.float64, generator=draw).requires_grad_()
    reference = torch.randn(4, 3, dtype=torch.float64, generator=draw).requires_grad_()
    assert torch.autograd.gradcheck(lambda new, old: kl_penalty(new, old, estimator), (logprobs, reference))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_are_never_negative_and_zero_at_equality(estimator):
    differences = torch.cat([torch.linspace(-5, 5, 1001), torch.zeros(1)])
    assert kl_penalty(torch.zeros_like(differences), differences, estimator).min() == 0


def test_k3_is_accurate_near_zero():
    # exp(x) - x - 1 in float32 loses x² / 2 = 5e-9 completely; the estimate is accurate to 0.1%
    assert kl_penalty(torch.zeros(1), torch.full((1,), 1e-4)).item() == pytest.approx(5e-9, rel=1e-3)


def test_estimates_are_clamped_to_ten_with_zero_gradient_beyond():
    logprobs = double(0, 0, 0).requires_grad_()
    reference = double(5, 2, -15)  # k3: 142.4, 4.39, 14
    estimates = kl_penalty(logprobs, reference, "k3")
    torch.testing.assert_close(estimates.detach(), double(10, math.exp(2) - 3, 10), rtol=0, atol=1e-14)
    estimates.sum().backward()
    torch.testing.assert_close(logprobs.grad, double(0, 1 - math.exp(2), 0), rtol=0, atol=1e-14)
    assert kl_penalty(double(0, 0), double(15, -15), "k1").tolist() == [-10, 10]


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_log_ratios_of_any_size_stay_finite_in_value_and_gradient(estimator):
    logprobs = torch.zeros(2, requires_grad=True)
    estimates = kl_penalty(logprobs, torch.tensor([1e4, -1e4]), estimator)
    estimates.sum().backward()
    assert estimates.abs().max() <= 10 and logprobs.grad.tolist() == [0, 0]


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_an_infinite_logprob_is_not_hidden_by_the_clamp(estimator):
    assert kl_penalty(torch.zeros(1), torch.tensor([-torch.inf]), estimator).isnan().all()


def test_low_precision_logprobs_are_computed_in_float32():
    narrow = torch.randn(8).bfloat16()
    assert kl_penalty(narrow, narrow + 1).dtype == torch.float32
    torch.testing.assert_close(kl_penalty(narrow, narrow * 2), kl_penalty(narrow.float(), narrow.float() * 2))


def test_an_unknown_estimator_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'.*k1, k2, k3"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")
