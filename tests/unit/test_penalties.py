"""What is added to rewards beside shaping, which responses the updates use, and advantages from a critic's values."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_g2rl.algorithm import overlong_penalty, token_kl
from megatron_g2rl.config import Config
from megatron_g2rl.exploration.methods import StepInputs
from megatron_g2rl.records import Response
from megatron_g2rl.training.collection import learning_signals
from megatron_g2rl.training.updates import loss_options

pytestmark = pytest.mark.same_for_both


def test_the_over_long_penalty_grows_over_the_buffer_only():
    lengths = torch.tensor([0, 16_384, 16_385, 18_432, 20_480, 30_000])
    found = overlong_penalty(lengths, max_tokens=20_480, buffer_tokens=4_096)
    assert found.tolist() == [0, 0, -1 / 4096, -0.5, -1, -1]
    assert overlong_penalty(torch.tensor([9, 10]), max_tokens=10, buffer_tokens=1).tolist() == [0, -1]


def test_the_kl_of_tokens_is_that_of_the_estimator_and_has_no_gradient():
    own = (torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([]))
    reference = (torch.tensor([-1.5, -1.0]), torch.tensor([]))
    first, empty = token_kl(own, reference, "k1")
    assert first.tolist() == [0.5, -1.0] and not first.requires_grad and not len(empty)
    assert token_kl(own, reference, "k3")[0].tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.e - 2])


def config(**algorithm) -> Config:
    return Config(
        model={"path": "none"},
        data={"source": "none"},
        rollout=dict(max_response_tokens=8),
        exploration=dict(method="none"),
        algorithm=algorithm,
    )


LENGTHS = [2, 8, 6, 8, 1, 3]
"""Tokens of two groups of three responses; those of 8 are truncated. The second group is uniform."""
STEP = StepInputs(
    torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, -1.0]),
    torch.tensor([True, False, True, False, False, False]),
    torch.tensor([0, 0, 0, 1, 1, 1]),
)
RESPONSES = [Response((7,) * n, (0.0,) * n, "", "length" if n == 8 else "stop", 0) for n in LENGTHS]


def test_the_penalty_is_added_to_shaped_rewards_and_gives_spread():
    found = learning_signals(STEP, RESPONSES, config(overlong_buffer_tokens=4))
    assert found.penalties.keys() == {"overlong"}
    assert found.shaped.tolist() == [1.0, -2.0, 0.5, -2.0, -1.0, -1.0]
    assert found.kept.all()  # by the penalty, the second group is no longer uniform
    plain = learning_signals(STEP, RESPONSES, config())
    assert torch.equal(plain.shaped, STEP.rewards) and not plain.penalties
    assert plain.kept.tolist() == [True] * 3 + [False] * 3


def test_masked_responses_are_not_trained_on_but_count_in_their_groups():
    found = learning_signals(STEP, RESPONSES, config(mask_truncated_responses=True))
    plain = learning_signals(STEP, RESPONSES, config())
    assert found.kept.tolist() == [True, False, True, False, False, False]
    assert torch.equal(found.advantages, plain.advantages)


def test_the_kl_is_subtracted_before_the_baseline_and_does_not_make_groups_usable():
    kl = [torch.full((n,), 0.25 * (i + 1)) for i, n in enumerate(LENGTHS)]
    settings = dict(use_kl_in_reward=True, kl_coefficient=0.1, normalize_std=False)
    found = learning_signals(STEP, RESPONSES, config(**settings), kl)
    sums = torch.tensor([n * 0.25 * (i + 1) for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(found.penalties["kl"], -0.1 * sums)
    rewards = (STEP.rewards - 0.1 * sums).view(2, 3)
    torch.testing.assert_close(found.advantages, (rewards - rewards.mean(1, keepdim=True)).flatten())
    assert torch.equal(found.shaped, STEP.rewards) and found.kept.tolist() == [True] * 3 + [False] * 3


VALUES = [torch.linspace(-1, 1, n) for n in LENGTHS]


def test_the_reward_of_a_response_is_that_of_its_last_token_and_the_kl_that_of_each():
    kl = [torch.full((n,), 0.25 * (i + 1)) for i, n in enumerate(LENGTHS)]
    settings = dict(baseline="critic", use_kl_in_reward=True, kl_coefficient=0.1, normalize_std=False)
    c = config(**settings, drop_uniform_groups=False, overlong_buffer_tokens=4)
    found = learning_signals(STEP, RESPONSES, c, kl, VALUES)
    assert found.kept.all()
    for i, (values, returns, advantages) in enumerate(
        zip(VALUES, found.estimates.returns, found.estimates.advantages, strict=True)
    ):
        # γ = λ = 1: the return of a token is the sum of the rewards from there on
        steps = torch.arange(len(values), 0, -1)
        torch.testing.assert_close(returns, found.shaped[i] - 0.1 * 0.25 * (i + 1) * steps)
        torch.testing.assert_close(advantages, returns - values)
        torch.testing.assert_close(found.advantages[i], advantages.mean())
    assert found.estimates.values == tuple(VALUES)


def test_advantages_are_normalized_over_the_tokens_of_the_responses_in_the_updates():
    c = config(baseline="critic", drop_uniform_groups=False, mask_truncated_responses=True, gae_lambda=0.9, gamma=0.99)
    found = learning_signals(STEP, RESPONSES, c, None, VALUES)
    assert found.kept.tolist() == [True, False, True, False, True, True]
    chosen = torch.cat([found.estimates.advantages[i] for i in (0, 2, 4, 5)])
    assert float(chosen.mean()) == pytest.approx(0, abs=1e-6) and float(chosen.std()) == pytest.approx(1, abs=1e-5)
    assert not torch.cat([found.estimates.advantages[i] for i in (1, 3)]).any()


def test_responses_without_tokens_have_no_estimates():
    empty = [Response((), (), "", "stop", 0)] * 6
    c = config(baseline="critic", drop_uniform_groups=False)
    found = learning_signals(STEP, empty, c, None, [torch.zeros(0)] * 6)
    assert not found.advantages.any() and all(len(each) == 0 for each in found.estimates.returns)


@pytest.mark.parametrize(("in_reward", "in_loss"), [(True, 0.0), (False, 0.1)])
def test_the_kl_term_is_either_in_the_reward_or_in_the_loss(in_reward, in_loss):
    options = loss_options(config(kl_coefficient=0.1, use_kl_in_reward=in_reward).algorithm)
    assert options.kl_coefficient == in_loss
