"""Novelty and geometry of a group follow docs/method.md, sections 2 and 5."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from megatron_g2rl.exploration import (
    exploration_scores,
    geometry,
    shape_groups,
    similarity,
)

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


# Three features with cosines 0 (first, second), 0.6 (first, third), 0.8 (second, third), and lengths 1, 2, 5.
FEATURES = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]], dtype=torch.float64)


def test_similarity_of_a_worked_example():
    expected = torch.tensor([[1, 0, 0.6], [0, 1, 0.8], [0.6, 0.8, 1]], dtype=torch.float64)
    torch.testing.assert_close(similarity(FEATURES), expected, **EXACT)


def test_similarity_equals_torch_cosine_similarity():
    features, _ = random_group(3)
    expected = cosine_similarity(features[:, None], features[None], dim=-1)
    torch.testing.assert_close(similarity(features), expected, **EXACT)


def test_novelty_of_a_worked_example():
    # rewards 1, 1, -1: for the first, w = e/(e + 1/e) on the second (S = 0) and 1/(1 + e²) on the third (S = 0.6);
    # for the third, w = 1/2 on each of the others, so its redundancy is (0.36 + 0.64)/2.
    scores = exploration_scores(FEATURES, double(1, 1, -1))
    share = 1 / (1 + math.e**2)
    expected = double(math.sqrt(1 - 0.36 * share), math.sqrt(1 - 0.64 * share), math.sqrt(0.5))
    torch.testing.assert_close(scores, expected, **EXACT)


def test_without_the_root_the_novelty_is_squared():
    rewards = double(1, 1, -1)
    squared = exploration_scores(FEATURES, rewards, root=False)
    torch.testing.assert_close(squared, exploration_scores(FEATURES, rewards).square(), **EXACT)


def test_a_group_of_identical_responses_has_no_novelty():
    # 1e-7: the square root of float64 rounding; in float32 this would be 3e-4
    features = torch.randn(1, 1024, generator=torch.Generator().manual_seed(0)).repeat(16, 1)
    assert exploration_scores(features, torch.linspace(-1, 1, 16)).max() < 1e-7
    opposite = features * torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    assert exploration_scores(opposite, torch.linspace(-1, 1, 16)).max() < 1e-7


def test_orthogonal_responses_have_full_novelty():
    torch.testing.assert_close(exploration_scores(torch.eye(5), torch.randn(5)), torch.ones(5), rtol=0, atol=0)


def test_a_zero_feature_is_redundant_with_nothing():
    features = torch.cat([FEATURES, torch.zeros(1, 2, dtype=torch.float64)])
    assert similarity(features)[3].tolist() == [0, 0, 0, 0]
    assert similarity(features)[:, 3].tolist() == [0, 0, 0, 0]
    scores = exploration_scores(features, double(1, 1, -1, -1))
    assert scores[3] == 1
    # the others: the zero feature takes weight and adds no redundancy
    assert scores[2].item() == pytest.approx(
        math.sqrt(1 - (0.36 + 0.64) * math.e / (2 * math.e + 1 / math.e)), abs=1e-14
    )


def test_the_novelty_of_zero_features_is_finite():
    assert exploration_scores(torch.zeros(4, 8), torch.ones(4)).tolist() == [1, 1, 1, 1]


def test_a_group_of_one_has_zero_novelty():
    assert exploration_scores(torch.randn(1, 8), torch.ones(1)).tolist() == [0]


def test_an_empty_group_has_no_novelty():
    assert exploration_scores(torch.zeros(0, 8), torch.zeros(0)).shape == (0,)


def test_large_rewards_do_not_overflow():
    # a reward 2000 above the others takes all the weight: the first sees only the second, the others only the first
    scores = exploration_scores(FEATURES, double(1000, 1000, -1000))
    torch.testing.assert_close(scores, double(1, 1, math.sqrt(0.5)), **EXACT)


@pytest.mark.parametrize("seed", range(20))
def test_novelty_is_in_the_unit_interval_and_follows_a_permutation(seed):
    features, rewards = random_group(seed)
    scores = exploration_scores(features, rewards)
    assert scores.min() >= 0 and scores.max() <= 1
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    # a different summation order: float64 rounding of up to 64 terms
    torch.testing.assert_close(exploration_scores(features[order], rewards[order]), scores[order], rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", range(10))
def test_novelty_does_not_depend_on_lengths_or_signs_of_features(seed):
    features, rewards = random_group(seed)
    draw = torch.Generator().manual_seed(seed)
    scale = torch.randn(len(rewards), 1, dtype=torch.float64, generator=draw).exp() * 1e6
    scale = scale * torch.randint(0, 2, scale.shape, generator=draw).mul(2).sub(1)
    expected = exploration_scores(features, rewards)
    torch.testing.assert_close(exploration_scores(features * scale, rewards), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-7), (torch.bfloat16, 2e-7)])
def test_low_precision_features_are_computed_in_float32(dtype, bound):
    # against the same rounded features in float64: only the rounding of the result to float32 remains
    features, rewards = random_group(4, size=16)
    narrow = features.to(dtype)
    scores = exploration_scores(narrow, rewards)
    assert scores.dtype == torch.float32
    assert similarity(narrow).dtype == torch.float32
    torch.testing.assert_close(scores.double(), exploration_scores(narrow.double(), rewards), rtol=0, atol=bound)


def test_non_finite_features_are_reported():
    features = torch.ones(4, 3)
    features[1, 2], features[3, 0] = torch.nan, torch.inf
    for function in (similarity, geometry, lambda value: exploration_scores(value, torch.ones(4))):
        with pytest.raises(ValueError, match=r"rows \[1, 3\] are not finite"):
            function(features)
    with pytest.raises(ValueError, match=r"rows \[1, 3\]"):
        shape_groups(features, torch.ones(4), torch.tensor([0, 1, 0, 1]))


@pytest.mark.usefixtures("unchecked_shapes")
def test_non_finite_rewards_and_rewards_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"rows \[2\] are not finite"):
        exploration_scores(FEATURES, double(1, 1, math.nan))
    with pytest.raises(ValueError, match=r"rewards must be \[3\]"):
        exploration_scores(FEATURES, double(1, 1))


# --- geometry -------------------------------------------------------------------------------------


def test_geometry_of_a_worked_example():
    # e1, 2 e1, e2, -e1 and a zero: pairs 1, 0, -1, 0, -1, 0; the unit vectors' Gram matrix has eigenvalues 3, 1, 0, 0
    features = torch.tensor([[1.0, 0], [2, 0], [0, 1], [-1, 0], [0, 0]])
    stats = geometry(features)
    assert stats.mean_cosine == pytest.approx(-1 / 6)
    assert stats.negative_fraction == pytest.approx(2 / 6)
    assert stats.orthogonal_fraction == pytest.approx(3 / 6)
    # exp(-(3/4) ln(3/4) - (1/4) ln(1/4)) = 4 / 3^(3/4)
    assert stats.effective_rank == pytest.approx(4 / 3**0.75)


def test_effective_rank_counts_orthogonal_directions():
    assert geometry(torch.eye(6)).effective_rank == pytest.approx(6)
    assert geometry(torch.ones(6, 3)).effective_rank == pytest.approx(1, abs=1e-6)


def test_orthogonal_means_a_cosine_below_a_tenth():
    def pair(cosine: float) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])

    assert geometry(pair(0.099)).orthogonal_fraction == 1
    assert geometry(pair(-0.099)).orthogonal_fraction == 1
    assert geometry(pair(0.101)).orthogonal_fraction == 0


@pytest.mark.parametrize("features, rank", [(torch.zeros(0, 4), 0), (torch.zeros(3, 4), 0), (torch.ones(1, 4), 1)])
def test_geometry_without_pairs_has_documented_values(features, rank):
    stats = geometry(features)
    assert (stats.mean_cosine, stats.negative_fraction, stats.orthogonal_fraction) == (0, 0, 0)
    assert stats.effective_rank == rank
