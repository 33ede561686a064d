"""Advantages from values against their definition, and the critic's loss against plain formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_g2rl.algorithm import UpdateTotals, explained_variance, generalized_advantages, value_loss, whiten

pytestmark = pytest.mark.same_for_both

EXACT = dict(rtol=1e-12, atol=1e-13)
"""The same float64 terms in another order."""


def batch(seed: int = 0):
    """Rewards, values and mask of responses of several lengths, one of them empty; NaN in the padding."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 1, 0, 4, 9])
    mask = torch.arange(9)[None] < lengths[:, None]
    rewards, values = torch.randn(2, 5, 9, generator=draw, dtype=torch.float64)
    return rewards.where(mask, math.nan), values.where(mask, math.nan), mask


def mixture_of_n_step_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: (1 - λ) Σ_n λ^(n-1) A^(n), in which the complete return has the rest of the weight."""
    advantages = []
    for t in range(len(rewards)):
        total, remaining = 0.0, len(rewards) - t
        for n in range(1, remaining + 1):
            n_step = sum(gamma**k * rewards[t + k] for k in range(n))
            n_step += gamma**n * values[t + n] if n < remaining else 0.0
            weight = (1 - lam) * lam ** (n - 1) if n < remaining else lam ** (n - 1)
            total += weight * (n_step - values[t])
        advantages.append(total)
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (0.99, 0.0), (0.0, 0.5)])
def test_advantages_are_the_weighted_mean_of_all_n_step_advantages(gamma, lam):
    rewards, values, mask = batch()
    found = generalized_advantages(rewards, values.requires_grad_(), mask, gamma, lam)
    assert not found.requires_grad and not found[~mask].any()
    for row in range(len(mask)):
        n = int(mask[row].sum())
        expected = mixture_of_n_step_advantages(rewards[row, :n].tolist(), values[row, :n].tolist(), gamma, lam)
        torch.testing.assert_close(found[row, :n], torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_with_a_terminal_reward_and_no_discount_the_target_of_every_value_is_the_reward():
    _, values, mask = batch()
    rewards = torch.zeros_like(values)
    rewards[0, 6], rewards[1, 0], rewards[3, 3], rewards[4, 8] = 1.0, -1.0, 0.5, 2.0
    returns = generalized_advantages(rewards, values, mask) + values.where(mask, 0.0)
    expected = torch.tensor([1.0, -1.0, 0.0, 0.5, 2.0], dtype=torch.float64)[:, None] * mask
    torch.testing.assert_close(returns, expected, **EXACT)


def test_whitened_advantages_have_mean_zero_and_unit_deviation_over_the_tokens():
    rewards, _, mask = batch()
    found = whiten(rewards, mask)
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-14)
    assert float(found[mask].std()) == pytest.approx(1, abs=1e-5) and not found[~mask].any()
    assert not whiten(rewards, torch.zeros_like(mask)).any()
    one = torch.zeros_like(mask)
    one[0, 0] = True
    assert not whiten(rewards, one).any()


@pytest.mark.parametrize("clip", [None, 0.3])
def test_the_loss_is_half_the_larger_squared_error_and_sums_over_micro_batches(clip):
    _, old, mask = batch(1)
    _, change, _ = batch(2)
    _, returns, _ = batch(3)
    values = (old + change).requires_grad_()
    total, expected = 0.0, []
    for v, o, r in zip(values[mask].tolist(), old[mask].tolist(), returns[mask].tolist(), strict=True):
        near = v if clip is None else min(max(v, o - clip), o + clip)
        expected.append(((near - r) ** 2 > (v - r) ** 2, max((v - r) ** 2, (near - r) ** 2)))
    loss, metrics = value_loss(values, old, returns, mask, clip)
    total = sum(error for _, error in expected) / len(expected) / 2
    assert loss.item() == pytest.approx(total, rel=1e-13)
    assert metrics["clip_fraction"].item() == pytest.approx(sum(c for c, _ in expected) / len(expected))
    assert (metrics["clip_fraction"] > 0) == (clip is not None)
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient[mask].isfinite().all() and not gradient[~mask].any()
    totals = UpdateTotals.of(mask)
    parts = [value_loss(values[i], old[i], returns[i], mask[i], clip, totals=totals) for i in ([0, 3], [1, 2, 4], [])]
    torch.testing.assert_close(sum(part for part, _ in parts), loss, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(sum(part for part, _ in parts), values)[0], gradient, **EXACT)


def test_the_gradient_of_the_loss_equals_finite_differences():
    _, old, mask = batch(1)
    _, change, _ = batch(2)
    old, returns = old.nan_to_num(), batch(3)[1].nan_to_num()
    values = (old + change.nan_to_num()).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, mask, 0.3)[0], values)


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one():
    returns = torch.tensor([1.0, -1.0, 0.5, 2.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.ones(4), returns) == pytest.approx(0, abs=1e-12)
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert math.isnan(explained_variance(returns, torch.ones(4)))
