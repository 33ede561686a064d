"""Shaping follows docs/method.md, section 3, sentence by sentence, for one group and for many."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_g2rl.exploration import MAPPINGS, exploration_scores, shape_by_novelty, shape_groups, shape_rewards

# float64 arithmetic of a few operations on numbers of order one
EXACT = {"rtol": 0, "atol": 1e-14}


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_group(seed: int, size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and -1/+1 or graded rewards of a group, in float64."""
    draw = torch.Generator().manual_seed(seed)
    size = size or int(torch.randint(2, 65, (), generator=draw))
    features = torch.randn(size, 12, dtype=torch.float64, generator=draw)
    rewards = torch.rand(size, dtype=torch.float64, generator=draw) * 2 - 1
    return features, rewards if seed % 2 else rewards.sign()


SHAPED = {
    # rewards 1, 1, -1 with novelty 0, 0.5, 1 and λ = 0.5; 2 sigmoid(x) - 1 = tanh(x / 2), k = 10
    "centered": (1 - 0.5, 1.0, -(1 + 0.5)),
    "literal": (1.0, 1 + 0.5 * 0.5, -(1 - 0.5)),
    "linear": (1.0, 1 + 0.5 * 0.5, -(1 + 0.5)),
    "logistic": (1 - 0.5 * math.tanh(2.5), 1.0, -(1 + 0.5 * math.tanh(2.5))),
    "saturating": (1 - 0.5 * math.tanh(5.0), 1.0, -(1 + 0.5 * math.tanh(5.0))),
    # the incorrect response is the only one of its class
    "within_class": (1.0, 1 + 0.5, -1.0),
    "correct_only": (1.0, 1 + 0.5, -1.0),
    "label_bands": (0.5, 1.0, -0.5),
    "product": (1 - 0.5, 1 - 0.5 * 0.5, -1.0),
}


def test_every_mapping_has_a_worked_example():
    assert set(SHAPED) == set(MAPPINGS)


@pytest.mark.parametrize("mapping", SHAPED)
def test_each_mapping_matches_its_worked_example(mapping):
    shaped = shape_rewards(double(1, 1, -1), double(0, 0.5, 1), mapping, strength=0.5)
    torch.testing.assert_close(shaped, double(*SHAPED[mapping]), **EXACT)


def test_minmax_normalizes_by_the_range_of_the_group_and_not_the_unit_interval():
    shaped = shape_rewards(double(1, 1, 1), double(0.8, 0.9, 0.85), "centered")
    torch.testing.assert_close(shaped, double(0.5, 1.5, 1.0), rtol=0, atol=1e-14)


def test_graded_rewards_use_the_same_formulas():
    torch.testing.assert_close(shape_rewards(double(0.5, -0.2), double(0, 1), "centered"), double(0.25, -0.3), **EXACT)


def test_centered_follows_the_paper():
    correct_novel, correct_plain, wrong_novel, wrong_plain = shape_rewards(
        double(1, 1, -1, -1), double(0.9, 0.2, 0.9, 0.2), "centered"
    )
    assert correct_novel > 1 > correct_plain
    assert wrong_novel < -1 < wrong_plain


def test_literal_penalizes_a_novel_incorrect_answer_less():
    wrong_plain, wrong_novel = shape_rewards(double(-1, -1), double(0.2, 0.9), "literal")
    assert wrong_plain == -1 and wrong_novel == -0.5


def test_linear_never_scales_below_one():
    features, rewards = random_group(8)
    shaped = shape_rewards(rewards, exploration_scores(features, rewards), "linear")
    assert (shaped.abs() >= rewards.abs()).all()


@pytest.mark.parametrize("mapping", sorted({*MAPPINGS} - {"label_bands", "product"}))
@pytest.mark.parametrize("scores", [(0.3, 0.3, 0.3), (0.3, 0.3 + 9e-7, 0.3)])
def test_equal_novelty_leaves_rewards_unchanged(mapping, scores):
    assert shape_rewards(double(1, -1, 0.5), double(*scores), mapping).tolist() == [1, -1, 0.5]


def test_a_novelty_spread_of_a_millionth_is_a_signal():
    assert shape_rewards(double(1, 1), double(0.3, 0.3 + 2e-6)).tolist() == [1, 1.5]
    assert shape_rewards(double(1, 1), double(0.3, 0.3 + 2e-6), "centered").tolist() == [0.5, 1.5]


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_strength_zero_leaves_rewards_unchanged(mapping):
    assert shape_rewards(double(1, -1, 0.5), double(0, 0.5, 1), mapping, strength=0).tolist() == [1, -1, 0.5]


def test_shaped_rewards_are_clipped_on_both_sides():
    assert shape_rewards(double(1, 1), double(0, 1), "centered", strength=2).tolist() == [-1, 3]
    bounded = shape_rewards(double(1, -1, 1), double(1, 1, 0), "centered", strength=2, clip=1.5)
    assert bounded.tolist() == [1.5, -1.5, -1]


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("seed", range(5))
def test_shaped_rewards_are_bounded_for_every_allowed_strength(mapping, seed):
    features, rewards = random_group(seed)
    for strength in (0.5, 1.0, 2.0):
        shaped = shape_rewards(rewards, exploration_scores(features, rewards), mapping, strength)
        assert shaped.abs().max() <= 3
        assert (shaped.abs() <= rewards.abs() * (1 + strength) + 1e-15).all()


@pytest.mark.parametrize("seed", range(0, 40, 2))
@pytest.mark.parametrize("mapping", ["centered", "correct_only"])
def test_the_default_strength_keeps_correct_above_incorrect(mapping, seed):
    features, rewards = random_group(seed)
    shaped = shape_rewards(rewards, exploration_scores(features, rewards), mapping)
    if (rewards > 0).any() and (rewards < 0).any():
        assert shaped[rewards > 0].min() > shaped[rewards < 0].max()


def test_an_unknown_mapping_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match="unknown mapping 'cubic'.*centered, literal, linear, logistic, saturating, within_class.*did you mean",
    ):
        shape_rewards(torch.ones(2), torch.ones(2), "cubic")


def test_within_class_favors_novelty_among_correct_and_among_incorrect_responses():
    rewards, scores = double(1, 1, 1, -1, -1, -1), double(0.2, 0.6, 0.4, 0.9, 0.5, 0.7)
    shaped = shape_rewards(rewards, scores, "within_class")
    torch.testing.assert_close(shaped, double(1, 1.5, 1.25, -0.5, -1, -0.75), **EXACT)
    shaped = shape_rewards(rewards, scores, "correct_only")
    torch.testing.assert_close(shaped, double(1, 1.5, 1.25, -1, -1, -1), **EXACT)


def test_a_class_without_spread_keeps_its_rewards():
    shaped = shape_rewards(double(1, 1, -1, -1), double(0.4, 0.4, 0.2, 0.9), "within_class")
    torch.testing.assert_close(shaped, double(1, 1, -1, -0.5), **EXACT)
    assert shape_rewards(double(-1, -1), double(0.1, 0.9), "correct_only").tolist() == [-1, -1]


def test_correctness_and_not_the_reward_decides_the_class():
    # partial credit: 0.5 for an incorrect answer, 0.2 for a correct but long one
    rewards, scores, correct = double(0.5, -1, 0.2, 1), double(0.1, 0.9, 0.3, 0.8), torch.tensor([0, 0, 1, 1]).bool()
    shaped = shape_rewards(rewards, scores, "within_class", correct=correct)
    torch.testing.assert_close(shaped, double(0.5, -0.5, 0.2, 1.5), **EXACT)
    shaped = shape_rewards(rewards, scores, "correct_only", correct=correct)
    torch.testing.assert_close(shaped, double(0.5, -1, 0.2, 1.5), **EXACT)


def test_label_bands_are_those_of_evol_rl():
    rewards, scores = double(1, 1, 1, -1, -1), double(0.2, 0.6, 0.4, 0.9, 0.5)
    shaped = shape_rewards(rewards, scores, "label_bands")
    torch.testing.assert_close(shaped, double(0.5, 1.0, 0.75, -0.5, -1), **EXACT)
    # a lone correct response 1.0, a lone incorrect one -0.5, equal scores the middle of the band
    assert shape_rewards(double(1, -1, -1), double(0.3, 0.3, 0.3), "label_bands").tolist() == [1, -0.75, -0.75]
    assert shape_rewards(double(1, 1, -1), double(0.3, 0.3, 0.3), "label_bands").tolist() == [0.75, 0.75, -0.5]


def test_the_product_is_the_reward_times_rarity_at_a_strength_of_one():
    rewards, scores = double(1, 1, -1), double(0.25, 0.5, 0.75)
    assert shape_rewards(rewards, scores, "product", strength=1).tolist() == [0.25, 0.5, -1]


# --- many groups ----------------------------------------------------------------------------------


def test_interleaved_groups_of_different_sizes_are_shaped_independently():
    sizes = {7: 1, -2: 5, 3: 16, 100: 2}
    parts = {name: random_group(seed, size) for seed, (name, size) in enumerate(sizes.items())}
    group = torch.tensor([name for name, size in sizes.items() for _ in range(size)])
    features = torch.cat([part[0] for part in parts.values()])
    rewards = torch.cat([part[1] for part in parts.values()])
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(5))
    shaped, scores = shape_groups(
        features[order], rewards[order], group[order], mapping="linear", strength=1.5, root=False
    )
    for name, (own_features, own_rewards) in parts.items():
        rows = torch.tensor([(order == index).nonzero().item() for index in (group == name).nonzero().flatten()])
        own_scores = exploration_scores(own_features, own_rewards, root=False)
        torch.testing.assert_close(scores[rows], own_scores, rtol=0, atol=1e-13)
        own_shaped = shape_rewards(own_rewards, own_scores, "linear", 1.5)
        torch.testing.assert_close(shaped[rows], own_shaped, rtol=0, atol=1e-11)


def test_classes_are_compared_within_their_group():
    rewards, novelty, group = double(1, 1, 1, 1), double(0.1, 0.5, 0.9, 0.2), torch.tensor([0, 1, 0, 1])
    shaped = shape_by_novelty(novelty, rewards, group, mapping="correct_only")
    torch.testing.assert_close(shaped, double(1, 1.5, 1.5, 1), **EXACT)


def test_an_empty_batch_has_no_shaped_rewards():
    shaped, scores = shape_groups(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert shaped.shape == scores.shape == (0,)


@pytest.mark.parametrize("mapping", sorted({*MAPPINGS} - {"label_bands", "product"}))
def test_a_group_of_one_keeps_its_reward(mapping):
    assert shape_rewards(torch.tensor([-1.0]), torch.zeros(1), mapping).tolist() == [-1]


def test_an_empty_group_has_no_shaped_rewards():
    assert shape_rewards(torch.zeros(0), torch.zeros(0)).shape == (0,)


@pytest.mark.usefixtures("unchecked_shapes")
def test_invalid_input_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="scores are not finite"):
        shape_rewards(double(1, 1), double(0, math.inf))
    with pytest.raises(ValueError, match=r"rows \[0\] are not finite"):
        shape_rewards(double(math.nan, 1), double(0, 1))
    with pytest.raises(ValueError, match=r"rewards must be \[3\]"):
        shape_rewards(double(1, 1), double(0, 1, 0))
