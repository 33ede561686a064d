"""The example of reward functions works as documented."""

from __future__ import annotations

from megatron_g2rl.rewards import FunctionSpec, RewardPool
from megatron_g2rl.rewards.binding import Sample


def test_the_reward_functions_of_the_example_work(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "examples" / "rewards")
    specs = [FunctionSpec(f"own_rewards:{name}") for name in ("brief", "overlong", "by_level", "Judge")]
    right = Sample(r"Hence \boxed{42}", "42", tokens=[1] * 2000, columns={"level": 3})
    wrong = Sample(r"\boxed{41}", "42", tokens=[1] * 6000, columns={"level": 3})
    cut = Sample("and so", "42", tokens=[1] * 100, finish_reason="length", columns={"level": 3}, complete=False)
    with RewardPool(specs, 1, 30.0) as pool:
        assert pool.bind({"problem", "answer", "level"}) == {"level"}
        brief, overlong, by_level, judge = pool.score_all([right, wrong, cut])
    assert brief.rewards == [0.75, -1.0, -1.0] and brief.correct == [True, False, False]
    assert overlong.rewards == [0.0, -0.5, -1.0]
    assert [round(reward, 9) for reward in by_level.rewards] == [0.6, -1.0, -1.0]
    assert judge.rewards == [1.0, 0.0, 0.0]
