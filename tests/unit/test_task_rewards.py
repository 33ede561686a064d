"""The rules of the built-in tasks: correct responses, partial credit, canonical forms; constant and noisy rewards."""

from __future__ import annotations

import random
from itertools import permutations, product

import pytest
import torch

from megatron_g2rl.algorithm import group_advantages
from megatron_g2rl.config.sections.rewards import RewardConfig
from megatron_g2rl.exploration import exploration_scores, shape_by_novelty
from megatron_g2rl.records import Prompt, Response, ResponseGroup
from megatron_g2rl.rewards import RewardPool, constant_reward, task_reward
from megatron_g2rl.rewards.binding import Sample
from megatron_g2rl.rewards.distribute import ScoredRewards, combine
from megatron_g2rl.rewards.noise import flip_rewards
from megatron_g2rl.rewards.tasks import countdown, sorting, tracking

pytestmark = pytest.mark.same_for_both


def chain(text: str, problem: str):
    return countdown.verify(f"\\boxed{{{text}}}", "", problem)


@pytest.mark.parametrize(
    "text, credit",
    [
        ("3*3=9,5-2=3,9+3=12", 1.0),
        ("5+2=7,3*3=9", 0.5),  # correct steps, another result
        ("3*3=9,5-2=4,9+3=12", 0.25),  # an incorrect result
        ("3*4=12", 0.0),  # a number that is not there
        ("3*3=9,3+9=12", 0.25),  # a number that is used up
        ("3-5=-2", 0.0),
        ("5-5=0", 0.0),
        ("3*3=9,", 0.25),
        ("", 0.0),
        ("12", 0.0),
    ],
)
def test_a_chain_of_countdown_is_correct_or_has_the_credit_of_its_correct_steps(text, credit):
    verdict = chain(text, "3 3 5 2:12")
    assert verdict.credit == credit and verdict.is_correct == (credit == 1)
    assert (verdict.form is not None) == (credit == 1)


@pytest.mark.parametrize("text", ["3*3=9,5-2=3,9+3=12", "so \\boxed{3*3=9,5-2=3,9+3=12}", "\\boxed{1}\\boxed{2}"])
def test_a_response_of_countdown_is_one_box_and_nothing_else(text):
    assert countdown.verify(text, "", "3 3 5 2:12").credit == 0


def test_results_of_countdown_end_at_99():
    assert chain("9*9=81,81+9=90", "9 9 9 9:90").is_correct
    assert not chain("9+9=18,9*18=162,162-9=153", "9 9 9 9:153").is_correct


def test_chains_of_countdown_have_the_same_form_if_and_only_if_they_are_the_same_expression():
    same = [
        ("1 2 4 9:7", "1+2=3,3+4=7", "4+2=6,6+1=7"),
        ("5 4 2 9:7", "5+4=9,9-2=7", "5-2=3,3+4=7"),  # the 9 is the result, not the number
        ("9 5 2 8:6", "5-2=3,9-3=6", "9-5=4,4+2=6"),  # 9-(5-2) = 9-5+2
        ("2 3 4 9:24", "2*3=6,6*4=24", "3*4=12,2*12=24"),
        ("2 3 4 9:10", "2*3=6,4+6=10", "3*2=6,6+4=10"),
        ("3 2 6 4:10", "3-2=1,6*1=6,6+4=10", "6+4=10"),  # a factor of 1
    ]
    forms = [{chain(text, problem).form for text in texts} for problem, *texts in same]
    assert all(len(each) == 1 and None not in each for each in forms), forms
    assert chain("4+2=6,6+1=7", "1 2 4 9:7").form != chain("9-4=5,5+2=7", "1 2 4 9:7").form
    assert chain("9-1=8,8+4=12", "1 4 9 2:12").form == "(+4+9-1)"


def test_equal_forms_of_countdown_are_equal_polynomials():
    """Independent oracle: the expression evaluated with random values in place of the numbers."""
    values = {str(n): random.Random(n).uniform(1, 2) for n in (2, 3, 5, 7)}
    by_form: dict[str, set[float]] = {}
    for order in permutations("2357"):
        for a, b, c in product("+-*", repeat=3):
            for shape in ("(({0}{a}{1}){b}{2}){c}{3}", "({0}{a}{1}){c}({2}{b}{3})"):
                text = shape.format(*order, a=a, b=b, c=c)
                symbolic = eval(text.translate({ord(d): f"values['{d}']" for d in "2357"}), {"values": values})
                by_form.setdefault(str(expression_form(text)), set()).add(round(symbolic, 9))
    assert all(len(found) == 1 for found in by_form.values())
    polynomials = [next(iter(found)) for found in by_form.values()]
    # forms keep brackets: distributed products are other expressions, so more forms than polynomials, but few more
    assert len(set(polynomials)) > 0.9 * len(polynomials)


def expression_form(text: str):
    """The form of a bracketed expression, by Python's parser."""
    import ast

    def visit(node):
        if isinstance(node, ast.Constant):
            return countdown.number(node.value)
        operator = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}[type(node.op)]
        # the value only matters if it is 1, which the numbers 2, 3, 5, 7 make rarely: kept out here
        return countdown.join(visit(node.left), operator, visit(node.right), 0)

    return visit(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize(
    "states, credit",
    [
        ("2,6,8", 1.0),
        ("2,6,7", 2 / 3),
        ("2,5,8", 1 / 3),
        ("1,6,8", 0.0),
        ("2,6", 2 / 3),
        ("2,6,8,8", 3 / 4),
        ("2, 6, 8", 1 / 3),
        ("", 0.0),
    ],
)
def test_tracking_has_the_credit_of_the_states_before_the_first_incorrect_one(states, credit):
    verdict = tracking.verify(f"\\boxed{{{states}}}", "2,6,8", "7:+5*3-8")
    assert verdict.credit == pytest.approx(credit) and verdict.is_correct == (credit == 1) and not verdict.has_forms


def test_states_of_tracking_are_modulo_10():
    assert tracking.states_of("8:+5-4*3") == [3, 9, 7]


@pytest.mark.parametrize(
    "order, credit",
    [
        ("bdac", 1.0),
        ("dbac", 1.0),
        ("dabc", 0.5),  # a and b are at each other's place
        ("ddac", 0.75),  # d counts once
        ("bda", 0.75),
        ("bdacx", 0.8),
        ("", 0.0),
    ],
)
def test_sorting_has_the_credit_of_its_positions(order, credit):
    verdict = sorting.verify(f"\\boxed{{{order}}}", "bdac", "a3 b1 c4 d1")
    assert verdict.credit == pytest.approx(credit)
    assert verdict.form == (order if credit == 1 else None)


@pytest.mark.parametrize("rules", [countdown, tracking, sorting])
def test_a_problem_of_another_task_is_an_error_that_shows_it(rules):
    with pytest.raises(ValueError, match="'2\\+2'"):
        rules.verify("\\boxed{4}", "4", "2+2")


def test_the_reward_is_that_of_the_task_of_each_row_and_graded_on_request():
    wrong = "\\boxed{3*3=9,5+2=7}"
    row = dict(answer="", problem="3 3 5 2:12", builtin_task="countdown")
    assert task_reward(wrong, **row) == {"reward": -1.0, "correct": False, "form": None}
    assert task_reward(wrong, **row, graded=True) == {"reward": 0.0, "correct": False, "form": None}
    right = task_reward("\\boxed{3*3=9,5-2=3,9+3=12}", **row, graded=True)
    assert right == {"reward": 1.0, "correct": True, "form": "(+3*3+5-2)"}
    assert task_reward("\\boxed{0.5}", "1/2") == 1.0
    assert task_reward("\\boxed{12}", "13", "4+9", "arithmetic") == -1.0
    assert "form" not in task_reward("\\boxed{3}", "3", "2:+1", "tracking")
    assert constant_reward("anything") == 1.0


@pytest.mark.parametrize("mapping", ["centered", "literal", "linear", "correct_only"])
def test_with_a_constant_reward_novelty_alone_makes_the_advantages(mapping):
    rewards, groups = torch.ones(6), torch.tensor([0, 0, 0, 1, 1, 1])
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    novelty = torch.cat([exploration_scores(features[groups == i], rewards[:3]) for i in range(2)])
    shaped = shape_by_novelty(novelty, rewards, groups, mapping=mapping, strength=0.5)
    advantages = group_advantages(shaped, groups)
    assert all(advantages[groups == i].std() > 0.1 for i in range(2))


def test_a_mixture_of_tasks_is_scored_in_workers_with_forms_where_a_task_has_them():
    rows = [
        Sample("\\boxed{bdac}", "bdac", columns={"problem": "a3 b1 c4 d1", "builtin_task": "sorting"}),
        Sample("\\boxed{abcd}", "bdac", columns={"problem": "a3 b1 c4 d1", "builtin_task": "sorting"}),
        Sample("\\boxed{3}", "3", columns={"problem": "2:+1", "builtin_task": "tracking"}),
        Sample("\\boxed{4}", "4"),
    ]
    with RewardPool("megatron_g2rl.rewards:task_reward", workers=1, deadline_s=60) as pool:
        assert pool.possible_columns >= {"problem", "builtin_task"}
        pool.bind({"problem", "builtin_task"})
        result = pool.score(rows)
    assert result.rewards == [1.0, -1.0, 1.0, 1.0] and result.correct == [True, False, True, None]
    assert result.forms == ["bdac", "", None, None]
    # an incomplete response is not correct, and has no form
    scored = combine([result], RewardConfig(function="megatron_g2rl.rewards:task_reward"), [False, True, True, True])
    assert scored.forms == ("", "", None, None) and scored.correct.tolist() == [False, False, True, True]


def make_groups(prompts: int, texts: list[str]) -> list[ResponseGroup]:
    responses = tuple(Response((1,), (0.0,), text, "stop", 0) for text in texts)
    return [ResponseGroup(Prompt(i, "", (1,), ""), responses) for i in range(prompts)]


def test_flips_depend_on_seed_prompt_and_text_only_and_have_their_probability():
    texts = [str(i) for i in range(200)] + ["copy", "copy"]
    groups = make_groups(20, texts)
    rewards = torch.linspace(-1, 1, 20 * 202)
    outcome = ScoredRewards(rewards, rewards > 0, {"part": rewards})
    noisy = flip_rewards(outcome, groups, 0.2, seed=3)
    flipped = noisy.rewards != outcome.rewards
    assert torch.equal(noisy.rewards.abs(), rewards.abs()) and noisy.parts is outcome.parts
    assert torch.equal(noisy.correct, outcome.correct ^ flipped)
    # five standard errors of a fraction of 4,040
    assert abs(flipped.float().mean() - 0.2) < 5 * (0.16 / 4040) ** 0.5
    by_group = flipped.view(20, 202)
    assert torch.equal(by_group[:, 200], by_group[:, 201]) and not (by_group == by_group[0]).all()
    # a part of the groups, as after a resume, has the same flips; another seed has others
    later = flip_rewards(ScoredRewards(rewards[-404:], rewards[-404:] > 0, {}), groups[-2:], 0.2, seed=3)
    assert torch.equal(later.rewards, noisy.rewards[-404:])
    assert not torch.equal(flip_rewards(outcome, groups, 0.2, seed=4).rewards, noisy.rewards)
    assert flip_rewards(outcome, groups, 0.0, seed=3) is outcome
