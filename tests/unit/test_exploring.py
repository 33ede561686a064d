"""Cost of exploration in a step: measured where Φ is computed, absent elsewhere, summed over rounds."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from megatron_g2rl.config.sections.method import ExplorationConfig
from megatron_g2rl.exploration.methods import StepInputs
from megatron_g2rl.policy.head import DeviceTimer, score_tokens
from megatron_g2rl.records import Experience, Prompt, Response, ResponseGroup, group_ids
from megatron_g2rl.training.collection import cost_metrics, drop_topk, shape

CPU = torch.device("cpu")


def experience(seconds: dict[str, float], groups: int = 2, size: int = 3) -> Experience:
    """Responses of which only the number matters."""
    made = tuple(
        ResponseGroup(Prompt(i, "", (1,), ""), (Response((1,), (0.0,), "", "stop", 0),) * size) for i in range(groups)
    )
    each = torch.zeros(groups * size)
    return Experience(made, each, each.bool(), each, each, each.bool(), exploration_seconds=seconds)


def test_parts_add_up_and_are_reset_when_read():
    timer = DeviceTimer(CPU)
    for _ in range(3):
        with timer.measure("slow"):
            time.sleep(0.01)
    with timer.measure("quick"):
        pass
    found = timer.read()
    assert 0.03 <= found["slow"] < 3 and 0 <= found["quick"] < found["slow"]
    assert timer.read() == {}


def test_the_head_times_its_work_for_the_feature_and_nothing_without_one():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(60, 8, generator=g), torch.randn(40, 8, generator=g)
    targets, response = torch.randint(0, 40, (60,), generator=g), torch.arange(60) // 20
    timer = DeviceTimer(CPU)
    start = time.perf_counter()
    counted = score_tokens(hidden, weight, targets, response, 3, timer=timer)
    whole = time.perf_counter() - start
    found = timer.read()
    assert found.keys() == {"features", "reduce_head"} and 0 < sum(found.values()) < whole
    assert torch.equal(counted.features, score_tokens(hidden, weight, targets, response, 3).features)
    score_tokens(hidden, weight, targets, response, 3, features=False, timer=timer)
    assert timer.read() == {}


def test_costs_of_a_step_are_reported_per_response_per_group_and_as_a_fraction():
    found = cost_metrics(experience({"features": 0.2, "reduce": 0.1, "shaping": 0.3}), step_seconds=6.0)
    assert found["cost/features_s"] == 0.2 and found["cost/reduce_s"] == 0.1 and found["cost/shaping_s"] == 0.3
    assert found["cost/exploration_s"] == pytest.approx(0.6)
    assert found["cost/per_response_ms"] == pytest.approx(100)
    assert found["cost/per_group_ms"] == pytest.approx(300)
    assert found["cost/step_fraction"] == pytest.approx(0.1)


def test_a_step_without_features_has_no_costs():
    assert cost_metrics(experience({}), step_seconds=6.0) == {}


def test_rounds_of_dynamic_sampling_are_summed():
    joined = experience({"features": 0.2, "shaping": 0.3}).joined(experience({"features": 0.4, "shaping": 0.1}, 1))
    assert joined.exploration_seconds == pytest.approx({"features": 0.6, "shaping": 0.4})
    assert cost_metrics(joined, 2.0)["cost/per_group_ms"] == pytest.approx(1000 / 3)


@pytest.mark.parametrize(
    "settings, shaped, scored",
    [
        (dict(method="gradient"), True, True),
        (dict(method="none", measure_geometry=True), False, True),
        (dict(method="none", measure_geometry=False), False, False),
    ],
)
def test_only_requested_quantities_are_computed(settings, shaped, scored):
    e = ExplorationConfig(**settings, source="sampler_topk", top_k=7)
    assert e.wants_features == scored and e.top_logprobs == (7 if scored else 0)
    assert ExplorationConfig(**settings).top_logprobs == 0
    features = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) if scored else None
    rewards, group = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([0, 0, 0, 0])
    found, novelty, seconds = shape(StepInputs(rewards, rewards > 0, group, features), e)
    assert torch.equal(found, rewards) != shaped and (novelty is not None) == scored
    assert seconds.keys() == ({"shaping"} if scored else set()) and all(value >= 0 for value in seconds.values())


def test_only_the_top_k_is_dropped():
    response = Response((1, 2), (-1.0, -2.0), "a", "stop", 3, np.zeros((2, 4), np.int32), np.zeros((2, 4), np.float16))
    (group,) = drop_topk([ResponseGroup(Prompt(0, "", (1,), ""), (response, response))])
    assert group.responses == (response, response) and group_ids([group]).tolist() == [0, 0]
    assert all(r.top_ids is None and r.top_logprobs is None for r in group.responses)


def test_a_gpu_is_synchronized_when_the_costs_are_read_and_not_before(monkeypatch):
    calls, now = [], iter([10.0, 35.0, 40.0, 45.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at_ms = next(now)

        def elapsed_time(self, end):
            assert calls == ["synchronize"]
            return end.at_ms - self.at_ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    timer = DeviceTimer(torch.device("cuda"))
    for _ in range(2):
        with timer.measure("features"):
            assert not calls
    assert timer.read() == {"features": pytest.approx(0.030)} and timer.read() == {}


def test_shaping_uses_correctness_and_not_the_reward_and_can_leave_uniform_groups_alone():
    # partial credit: an incorrect response has a positive reward, and a correct one a negative reward
    rewards, correct = torch.tensor([0.5, -0.5, 1.0, 1.0]), torch.tensor([False, True, True, False])
    group, draw = torch.zeros(4, dtype=torch.long), torch.Generator().manual_seed(0)
    step = StepInputs(rewards, correct, group, torch.randn(4, 5, generator=draw))
    shaped, _, _ = shape(step, ExplorationConfig(mapping="correct_only"))
    assert torch.equal(shaped[~correct], rewards[~correct]) and not torch.equal(shaped[correct], rewards[correct])
    equal = StepInputs(torch.ones(4), torch.ones(4).bool(), group, step.features)
    assert not torch.equal(shape(equal, ExplorationConfig())[0], equal.rewards)
    assert torch.equal(shape(equal, ExplorationConfig(uniform_groups="base"))[0], equal.rewards)
    assert not torch.equal(shape(step, ExplorationConfig(uniform_groups="base"))[0], rewards)
