"""Each exploration method matches a hand-computed example and the limits that its paper states."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_g2rl.config.sections.method import WITHOUT_FEATURES, ExplorationConfig
from megatron_g2rl.exploration import exploration_scores, shape_by_novelty
from megatron_g2rl.exploration.methods import Method, StepInputs, load_method
from megatron_g2rl.exploration.methods.elliptical import RIDGE, leverage
from megatron_g2rl.exploration.methods.partition import rarity
from megatron_g2rl.exploration.methods.semantic import group_novelty
from megatron_g2rl.exploration.shaping import shape_rewards
from megatron_g2rl.registry import METHODS, ExtensionError

EXACT = {"rtol": 0, "atol": 1e-14}


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_step(seed: int = 0) -> StepInputs:
    """Two interleaved groups of five responses with all inputs."""
    draw = torch.Generator().manual_seed(seed)
    vectors = lambda: torch.randn(10, 6, generator=draw)  # noqa: E731
    rewards = torch.randn(10, generator=draw).sign()
    classes = torch.randint(0, 3, (10,), generator=draw)
    ids = torch.arange(10) % 2
    return StepInputs(rewards, rewards > 0, ids, vectors(), vectors(), vectors(), classes)


@pytest.mark.parametrize("name", sorted({*METHODS} - {"none"}))
def test_every_method_gives_a_novelty_between_0_and_1_and_names_a_registered_mapping(name):
    method, step = load_method(name), random_step()
    novelty = method.novelty(step)
    assert novelty.shape == (10,) and novelty.dtype == torch.float32
    assert 0 <= novelty.min() < novelty.max() <= 1
    shaped = shape_by_novelty(novelty, step.rewards, step.group_ids, correct=step.correct, mapping=method.mapping)
    assert not torch.equal(shaped, step.rewards)


@pytest.mark.parametrize("name", sorted({*METHODS} - {"elliptical"}))
def test_groups_do_not_influence_each_other(name):
    step, method = random_step(), load_method(name)
    novelty = method.novelty(step)
    for group in (0, 1):
        own = step.group_ids == group
        columns = (
            step.rewards,
            step.correct,
            step.group_ids,
            step.features,
            step.hidden,
            step.embeddings,
            step.classes,
        )
        alone = method.novelty(StepInputs(*(column[own] for column in columns)))
        torch.testing.assert_close(alone, novelty[own], rtol=1e-6, atol=1e-6)


def test_gradient_and_hidden_are_the_paper_s_novelty_of_their_vectors():
    step = random_step()
    for name, vectors in (("gradient", step.features), ("hidden", step.hidden)):
        for root in (True, False):
            found = load_method(name).novelty(StepInputs(**(vars(step) | dict(root=root))))
            for group in (0, 1):
                own = step.group_ids == group
                expected = exploration_scores(vectors[own], step.rewards[own], root)
                torch.testing.assert_close(found[own], expected, rtol=0, atol=0)


# --- EVOL-RL --------------------------------------------------------------------------------------


def test_semantic_novelty_matches_a_hand_computed_group():
    # unit vectors at 0, 60 and 180 degrees; the first two are correct
    embeddings = torch.stack([double(math.cos(a), math.sin(a)) for a in (0, math.pi / 3, math.pi)])
    novelty = group_novelty(embeddings, torch.tensor([True, True, False]))
    # similarities: 0.5 between the correct ones; 0 to the third, which is opposite to the first and at 120 degrees
    torch.testing.assert_close(novelty, double(1 - (0.5 + 0.5) / 2, 1 - (0.5 + 0.5) / 2, 1.0), **EXACT)


def test_semantic_novelty_compares_means_with_the_same_label_and_the_largest_with_all():
    embeddings = torch.stack([double(1, 0), double(1, 0), double(0, 1), double(0, 1)])
    labels = torch.tensor([True, False, True, False])
    # each has a copy with the other label (largest 1), and an orthogonal response with its own label (mean 0)
    torch.testing.assert_close(group_novelty(embeddings, labels), double(0.5, 0.5, 0.5, 0.5), **EXACT)
    copies = torch.ones(4, 2, dtype=torch.float64)
    assert group_novelty(copies, labels).abs().max() < 1e-15, "copies have no novelty"
    assert group_novelty(torch.eye(4, dtype=torch.float64), labels).tolist() == [1] * 4
    assert group_novelty(torch.ones(1, 2), torch.tensor([True])).tolist() == [1]


# --- DARLING --------------------------------------------------------------------------------------


def test_rarity_is_the_fraction_of_others_in_another_class():
    torch.testing.assert_close(rarity(torch.tensor([7, 7, 7, 2, 3])).double(), double(0.5, 0.5, 0.5, 1, 1), **EXACT)
    assert rarity(torch.tensor([4, 4])).tolist() == [0, 0] and rarity(torch.tensor([4])).tolist() == [0]


def test_a_rare_correct_answer_earns_more_than_a_common_one():
    rewards = double(1, 1, 1, 1, -1)
    shaped = shape_rewards(rewards, rarity(torch.tensor([0, 0, 0, 1, 2])).double(), "product", strength=1)
    torch.testing.assert_close(shaped, double(0.5, 0.5, 0.5, 1.0, -1.0), **EXACT)


# --- RepExp ---------------------------------------------------------------------------------------


def test_leverage_is_the_elliptical_bonus_by_its_definition():
    hidden = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 2
    centered = hidden - hidden.mean(0)
    ridge = RIDGE * centered.square().sum(1).mean()
    covariance = ridge * torch.eye(5, dtype=torch.float64) + centered.T @ centered
    expected = torch.einsum("ri,ij,rj->r", centered, torch.linalg.inv(covariance), centered)
    torch.testing.assert_close(leverage(hidden), expected, rtol=1e-10, atol=1e-12)


def test_an_outlier_of_the_step_has_the_largest_bonus_whatever_the_scale_of_the_model():
    hidden = torch.zeros(20, 8)
    hidden[:10, 0], hidden[10:19, 0], hidden[19, 1] = 1, -1, 1
    bonus = leverage(hidden)
    assert bonus.argmax() == 19
    torch.testing.assert_close(leverage(1000 * hidden), bonus, rtol=1e-9, atol=1e-12)
    assert leverage(torch.ones(4, 8)).tolist() == [0] * 4, "equal states have no novelty"


# --- interface ------------------------------------------------------------------------------------


def test_what_is_no_method_is_refused():
    with pytest.raises(ExtensionError, match="builtins:dict is a type, not a Method"):
        load_method("builtins:dict")
    with pytest.raises(ExtensionError, match="unknown exploration method 'gradients'.*did you mean gradient"):
        load_method("gradients")
    assert isinstance(load_method("partition"), Method)


def test_the_configuration_knows_which_methods_use_the_update_directions():
    without = {name for name in METHODS if "features" not in load_method(name).needs}
    assert without == set(WITHOUT_FEATURES)


@pytest.mark.parametrize("name", METHODS)
def test_the_mapping_follows_the_method_unless_it_is_set(name):
    mapping = load_method(name).mapping
    assert ExplorationConfig(method=name).mapping == (mapping or "correct_only")
    assert ExplorationConfig(method=name, mapping=None).mapping == (mapping or "correct_only")
    assert ExplorationConfig(method=name, mapping="literal").mapping == "literal"
    assert ExplorationConfig(method="mine:METHOD").mapping is None
