"""A mixture of built-in tasks with noisy, graded rewards trains, and is evaluated on a third task."""

from __future__ import annotations

import pytest
from training_runs import read_metrics, train

pytestmark = [pytest.mark.slow, pytest.mark.same_for_both]

MIXTURE = [
    "data.source=null",
    "data.sources=[{source: 'builtin:countdown', weight: 3}, {source: 'builtin:sorting', weight: 1}]",
    "data.max_prompt_tokens=48",
    "evaluation.source=builtin:sorting_long",
    "reward.function=megatron_g2rl.rewards:task_reward",
    "reward.arguments={graded: true}",
    "reward.flip_probability=0.3",
    "trainer.steps=2",
    "evaluation.every_steps=2",
]


def test_a_mixture_with_noisy_rewards_trains_and_is_evaluated_without_noise_on_another_task(tmp_path, environment):
    lines = train(tmp_path, "mixture", environment, *MIXTURE)
    # an untrained model solves nothing, but three in ten responses count as correct
    assert len(lines) == 2 and all(line["response/distinct_correct"] == 0 for line in lines)
    assert all(line["reward/pass_rate"] > 0 for line in lines)
    evaluations = read_metrics(tmp_path / "mixture", "evaluation.jsonl")
    assert len(evaluations) == 2 and all(line["evaluation/distinct_correct_at_2"] == 0 for line in evaluations)
    assert all(line["evaluation/pass_at_1"] == 0 for line in evaluations)
