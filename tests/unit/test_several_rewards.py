"""Several weighted rewards: the sum, correctness, metrics, the smoke test, and invalid configurations."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.distributed as dist

from megatron_g2rl.config.checks import check_config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.sections.rewards import RewardConfig
from megatron_g2rl.config.tree import Config
from megatron_g2rl.records import Prompt, Response, ResponseGroup
from megatron_g2rl.rewards import RewardError, RewardResult
from megatron_g2rl.rewards.distribute import DistributedRewards, combine
from megatron_g2rl.tracking.metrics import spread_metrics

MATH, FORMAT = "megatron_g2rl.rewards:math_reward", "own_parts:short"


def result(rewards, correct=None, lost=(), forms=None) -> RewardResult:
    count = len(rewards)
    late, none = [i in lost for i in range(count)], [None] * count
    return RewardResult(list(rewards), correct or none, forms or none, late, [False] * count, [0.0] * count, 0.0)


def several(*weights, **settings) -> RewardConfig:
    functions = [{"function": f"m:f{i}", "weight": weight} for i, weight in enumerate(weights)]
    return RewardConfig(functions=functions, correct_by="f0", **settings)


def test_rewards_are_weighted_and_summed_and_one_function_decides_correctness():
    parts = [result([1.0, -1.0, 1.0]), result([0.0, 10.0, 5.0], [False, True, False])]
    found = combine(parts, several(0.5, 0.04), [True, True, False])
    assert found.rewards.tolist() == pytest.approx([0.5, -0.1, 0.7])
    assert found.correct.tolist() == [True, False, False]  # the last is incomplete
    assert {name: part.tolist() for name, part in found.parts.items()} == {"f0": [1, -1, 1], "f1": [0, 10, 5]}
    other = combine(parts, several(0.5, 0.04).model_copy(update={"correct_by": "f1"}), [True] * 3)
    assert other.correct.tolist() == [False, True, False]


def test_correctness_is_independent_of_the_reward():
    found = combine(
        [result([0.1, 0.9, -1.0, 0.1], [False, None, True, None])], RewardConfig(correct_above=0.5), [True] * 4
    )
    assert found.correct.tolist() == [False, True, True, False]
    assert found.rewards.tolist() == pytest.approx([0.1, 0.9, -1.0, 0.1]) and found.parts == {}


def test_a_failing_function_never_increases_a_reward_and_is_excluded_from_its_metric():
    parts = [result([1.0, 1.0]), result([0.5, -1.0], [None, False], lost=[1])]
    for weight in (0.2, -0.2):
        found = combine(parts, several(1.0, weight), [True, True])
        assert found.rewards.tolist() == pytest.approx([1.0 + weight / 2, 0.8])
        assert found.parts["f1"][0] == 0.5 and found.parts["f1"][1].isnan()
    late = combine([result([-1.0], [False], lost=[0])], RewardConfig(correct_above=-2.0), [True])
    assert late.correct.tolist() == [False]


def test_metrics_are_mean_and_standard_deviation_of_the_values():
    values = torch.tensor([1.0, 3.0, 5.0])
    found = {name: float(value) for name, value in spread_metrics("reward/x", values).items()}
    assert found == pytest.approx({"reward/x/mean": 3.0, "reward/x/std": math.sqrt(8 / 3)})
    assert all(value.isnan() for value in spread_metrics("reward/x", values[:0]).values())


def config(**reward) -> Config:
    return Config(model={"path": "org/model"}, data={"source": "builtin:arithmetic"}, reward=reward)


TWO = [{"function": MATH}, {"function": "json:dumps", "weight": 0.1}]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"functions": TWO}, r"reward\.correct_by is not set.*math_reward or dumps"),
        ({"functions": TWO, "correct_by": "loads"}, r"reward\.correct_by=loads is not one of.*math_reward, dumps"),
        ({"functions": [*TWO, TWO[1]], "correct_by": "dumps"}, "dumps is used more than once"),
        ({"functions": TWO, "correct_by": "dumps", "function": "json:loads"}, "both set"),
        ({"functions": TWO, "correct_by": "dumps", "arguments": {"x": 1}}, "entries of reward.functions"),
        ({"functions": [{"function": "nowhere_at_all:f"}]}, "no module nowhere_at_all"),
        ({"functions": [{"function": MATH, "weight": 0}]}, "every weight is 0"),
        ({"function": MATH, "correct_by": "other"}, "correct_by=other is not one"),
    ],
)
def test_ambiguous_settings_of_several_functions_are_refused(reward, message):
    with pytest.raises(ConfigError, match=message):
        check_config(config(**reward), ranks=1)
    check_config(config(functions=TWO, correct_by="dumps"), ranks=1)
    check_config(config(functions=[TWO[0] | {"name": "a"}, TWO[0] | {"name": "b"}], correct_by="b"), ranks=1)


PARTS = r"""
import os, time

def short(response, answer, tokens, finish_reason):
    return 1.0 - len(tokens) / 10, finish_reason == "stop"

def sees(response, answer):
    return 0.0 if response else -1.0

def exits(response, answer):
    os._exit(3)

def hangs(response, answer):
    time.sleep(3600)

def text(response, answer):
    return "good"

def wide(response, answer):
    return 40.0
"""


@pytest.fixture
def make_rewards(tmp_path, monkeypatch):
    """Creates `DistributedRewards` with a world size of one."""
    (tmp_path / "own_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = []

    def make(**reward) -> DistributedRewards:
        made.append(DistributedRewards(RewardConfig(workers=1, **reward)))
        made[-1].bind(())
        return made[-1]

    yield make
    for rewards in made:
        rewards.close()
    dist.destroy_process_group()


PROMPT = Prompt(0, "1+1", (1,), "2")


def group(*ends: str) -> ResponseGroup:
    return ResponseGroup(PROMPT, tuple(Response((1,) * 4, (0.0,) * 4, r"\boxed{2}", end, 0) for end in ends))


def test_truncated_responses_reach_only_functions_that_can_detect_them_and_are_never_correct(make_rewards):
    functions = [{"function": "own_parts:short"}, {"function": "own_parts:sees", "weight": 0.5}]
    rewards = make_rewards(functions=functions, correct_by="short")
    found = rewards.score([group("stop", "length", "stop")], [True, False, False])
    assert found.parts["short"].tolist() == pytest.approx([0.6, 0.6, 0.6])
    assert found.parts["sees"].tolist() == [0, -1, -1]
    assert found.rewards.tolist() == pytest.approx([0.6, 0.1, 0.1])
    assert found.correct.tolist() == [True, False, False]


def test_the_smoke_test_shows_the_rewards(make_rewards, caplog):
    caplog.set_level(logging.INFO)
    functions = [{"function": MATH}, {"function": "own_parts:short", "weight": 0.5}]
    make_rewards(functions=functions, correct_by="math_reward").smoke_test(PROMPT, lambda text: [1, 2, 3])
    assert r"smoke test of megatron_g2rl.rewards:math_reward" in caplog.text
    assert "an empty response: reward -1, incorrect" in caplog.text
    assert r"'\\boxed{2}': reward 1, correct" in caplog.text
    assert r"'\\boxed{2}': reward 0.7, correct" in caplog.text  # three tokens


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exits", "own_parts:exits exited its process.*in its smoke test"),
        (
            "hangs",
            r"own_parts:hangs exceeded reward\.deadline_s \(0\.5 s\) in its smoke test.*raise reward\.deadline_s",
        ),
        ("text", "'good'; a reward must be a number in"),
        ("wide", "40.0; a reward must be a number in"),
    ],
)
def test_a_function_that_fails_its_smoke_test_is_refused_with_the_reason(make_rewards, name, message):
    with pytest.raises(RewardError, match=message):
        deadline_s = 0.5 if name == "hangs" else 60.0
        make_rewards(function=f"own_parts:{name}", deadline_s=deadline_s).smoke_test(PROMPT, lambda text: [])


def test_a_sum_of_another_scale_causes_one_warning(make_rewards, caplog):
    rewards = make_rewards(functions=[{"function": "own_parts:wide", "weight": 0.5}])
    for _ in range(2):
        assert rewards.score([group("stop")], [True]).rewards.tolist() == [20.0]
    assert caplog.text.count("weighted sum of reward.functions is 20") == 1


@pytest.mark.parametrize(("count", "world"), [(7, 1), (7, 2), (7, 3), (2, 3)])
def test_the_results_of_all_ranks_are_in_the_order_of_the_responses(count, world):
    parts = [result([float(i) for i in range(count)][rank::world], lost=[0] * (rank == 1)) for rank in range(world)]
    joined = RewardResult.interleaved(parts)
    assert joined.rewards == list(range(count))
    assert joined.timed_out == [world > 1 and i == 1 for i in range(count)]
