"""Group advantages follow docs/method.md, section 4, on hand-computed examples."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_g2rl.algorithm import group_advantages, has_spread
from megatron_g2rl.exploration import shape_groups

ONE_GROUP = torch.zeros(3, dtype=torch.long)
# float64 arithmetic of a few operations on numbers of order one
EXACT = {"rtol": 0, "atol": 1e-14}


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_standard_deviation_is_unbiased_and_epsilon_is_a_millionth():
    # 1, 2, 3: mean 2, ddof=1 standard deviation 1 (ddof=0 would give 0.816)
    expected = double(-1, 0, 1) / (1 + 1e-6)
    torch.testing.assert_close(group_advantages(double(1, 2, 3), ONE_GROUP), expected, **EXACT)


def test_epsilon_is_added_to_the_standard_deviation():
    torch.testing.assert_close(group_advantages(double(1, 2, 3), ONE_GROUP, epsilon=1.0), double(-0.5, 0, 0.5), **EXACT)


def test_without_std_only_the_mean_is_subtracted():
    advantages = group_advantages(double(1, 1, -1), ONE_GROUP, normalize_std=False)
    torch.testing.assert_close(advantages, double(2 / 3, 2 / 3, -4 / 3), **EXACT)


def test_leave_one_out_subtracts_the_mean_of_the_others():
    advantages = group_advantages(double(1, 2, 6), ONE_GROUP, normalize_std=False, baseline="leave_one_out")
    torch.testing.assert_close(advantages, double(1 - 4, 2 - 3.5, 6 - 1.5), **EXACT)


def test_leave_one_out_can_be_divided_by_the_std_too():
    # 1, 2, 3: minus 2.5, 2, 1.5; standard deviation 1
    advantages = group_advantages(double(1, 2, 3), ONE_GROUP, baseline="leave_one_out")
    torch.testing.assert_close(advantages, double(-1.5, 0, 1.5) / (1 + 1e-6), **EXACT)


def test_groups_are_independent_of_their_order_and_size():
    # group 5: 1, 2, 3; group -1: 10, 20; group 40: a lone 7
    rewards = double(10, 1, 7, 2, 20, 3)
    group = torch.tensor([-1, 5, 40, 5, -1, 5])
    half = 5 / math.sqrt(50)
    expected = double(-half, -1, 0, 0, half, 1)
    # epsilon 1e-6 over standard deviations of 1 and more
    torch.testing.assert_close(group_advantages(rewards, group), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_a_group_of_one_has_no_advantage(baseline, normalize_std):
    advantages = group_advantages(double(5), ONE_GROUP[:1], normalize_std=normalize_std, baseline=baseline)
    assert advantages.tolist() == [0]


@pytest.mark.parametrize("size", [2, 3, 7, 16, 31])
@pytest.mark.parametrize("value", [0.1, 0.7, -1 / 3, 1e3 / 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_uniform_group_has_advantages_of_exactly_zero(size, value, dtype):
    # in float32 the mean of three 0.7 is not 0.7, and epsilon would turn 6% of that noise into an advantage
    rewards = torch.full((size,), value, dtype=dtype)
    assert group_advantages(rewards, torch.zeros(size, dtype=torch.long)).tolist() == [0] * size


def test_rounding_noise_in_equal_rewards_is_not_an_advantage():
    assert group_advantages(double(0.7, 0.7 + 1e-9, 0.7 - 1e-9), ONE_GROUP).tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(10))
def test_advantages_have_mean_zero_unit_std_and_follow_a_permutation(seed):
    draw = torch.Generator().manual_seed(seed)
    group = torch.arange(64) // 16
    rewards = torch.rand(64, dtype=torch.float64, generator=draw) * 6 - 3
    advantages = group_advantages(rewards, group)
    for index in range(4):
        own = advantages[group == index]
        assert own.mean().abs() < 1e-14
        # std / (std + 1e-6) with a standard deviation above one
        assert own.std(unbiased=True).item() == pytest.approx(1, abs=1e-6)
    order = torch.randperm(64, generator=draw)
    torch.testing.assert_close(group_advantages(rewards[order], group[order]), advantages[order], rtol=0, atol=1e-13)


def test_result_is_float32_unless_rewards_are_float64():
    assert group_advantages(torch.tensor([1.0, -1.0, 1.0]), ONE_GROUP).dtype == torch.float32
    assert group_advantages(torch.tensor([1.0, -1.0, 1.0]).bfloat16(), ONE_GROUP).dtype == torch.float32
    assert group_advantages(double(1, 2, 3), ONE_GROUP).dtype == torch.float64


def test_an_empty_batch_has_no_advantages():
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert has_spread(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_spread_is_determined_per_group():
    rewards = double(1, 1, -1, 1, 1 + 1e-7, 0)
    group = torch.tensor([0, 1, 0, 1, 1, 2])
    assert has_spread(rewards, group).tolist() == [True, False, True, False, False, False]


def test_spread_accepts_a_tolerance():
    assert has_spread(double(0, 0.1, 0.05), ONE_GROUP, tolerance=0.2).tolist() == [False] * 3
    assert has_spread(double(0, 0.1, 0.05), ONE_GROUP, tolerance=0.0).tolist() == [True] * 3


def test_shaping_gives_an_all_correct_group_spread():
    features = torch.tensor([[1.0, 0], [1, 0.1], [0, 1]])
    rewards = torch.ones(3)
    assert not has_spread(rewards, ONE_GROUP).any()
    assert group_advantages(rewards, ONE_GROUP).tolist() == [0, 0, 0]
    shaped, _ = shape_groups(features, rewards, ONE_GROUP)
    assert has_spread(shaped, ONE_GROUP).all()
    assert group_advantages(shaped, ONE_GROUP)[2] > 1, "the one that differs is favored"


def test_shaping_gives_an_all_correct_group_of_equal_answers_no_spread():
    shaped, _ = shape_groups(torch.ones(3, 8), torch.ones(3), ONE_GROUP)
    assert not has_spread(shaped, ONE_GROUP).any()


@pytest.mark.usefixtures("unchecked_shapes")
def test_invalid_input_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"rows \[1\] are not finite"):
        group_advantages(double(1, math.nan, 2), ONE_GROUP)
    with pytest.raises(ValueError, match=r"\[2\] and \[3\]"):
        group_advantages(double(1, 2), ONE_GROUP)
    with pytest.raises(ValueError, match="unknown baseline 'median'"):
        group_advantages(double(1, 2, 3), ONE_GROUP, baseline="median")
