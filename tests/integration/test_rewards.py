"""Two weighted rewards in a training run: a batch class that decides correctness, and a function of data columns."""

from __future__ import annotations

import json

import pytest
from training_runs import attempt, read_metrics, train, without_times

PARTS = r'''
import os

class Parity:
    """Half of the responses are correct, whatever their reward."""

    def __init__(self, scale):
        self.scale = scale
        open("set_up", "a").write(f"{os.getpid()}\n")

    def __call__(self, responses, answers):
        return [(self.scale * (len(text) % 5) / 4, len(text) % 2 == 0) for text in responses]


async def length(response, answer, *, tokens, finish_reason, problem):
    assert problem.count("+") >= 1 and finish_reason in ("stop", "length")
    return -len(tokens)
'''
FUNCTIONS = [
    {"function": "two_parts:Parity", "name": "parity", "weight": 0.5, "arguments": {"scale": -1.0}},
    {"function": "two_parts:length", "weight": 0.01, "deadline_s": 30},
]
SETTINGS = [f"reward.functions={json.dumps(FUNCTIONS)}", "reward.correct_by=parity", "checkpoint.every_steps=1"]
SETTINGS += ["evaluation.every_steps=1", "logging.responses_every_steps=1"]


@pytest.mark.same_for_both
def test_two_weighted_rewards_train_and_resume_with_separate_metrics_and_correctness(tmp_path, environment):
    (tmp_path / "two_parts.py").write_text(PARTS)
    uninterrupted = train(tmp_path, "uninterrupted", environment, *SETTINGS, "trainer.steps=2")
    train(tmp_path, "parted", environment, *SETTINGS, "trainer.steps=1")
    resumed = train(tmp_path, "parted", environment, *SETTINGS, "trainer.steps=2")
    assert without_times(resumed) == without_times(uninterrupted) and len(uninterrupted) == 2
    for line in uninterrupted:
        total = 0.5 * line["reward/parity/mean"] + 0.01 * line["reward/length/mean"]
        assert line["reward/mean"] == pytest.approx(total, abs=1e-5)
        assert line["reward/length/mean"] == pytest.approx(-line["response_length/mean"], abs=1e-4)
        assert line["reward/parity/std"] > 0 and line["reward/mean"] < 0
        # no reward is above 0, so correctness comes from the first function
        assert 0 < line["reward/pass_rate"] < 1 and line["reward/timeouts"] == line["reward/worker_crashes"] == 0
    rows = read_metrics(tmp_path / "uninterrupted", "responses.jsonl")
    assert all(row["correct"] == (len(row["response"]) % 2 == 0) for row in rows)
    evaluations = read_metrics(tmp_path / "uninterrupted", "evaluation.jsonl")
    assert any(0 < line["evaluation/pass_at_1"] for line in evaluations)
    assert len((tmp_path / "set_up").read_text().split()) == 3, "one set-up in the one worker of each run"
    (tmp_path / "two_parts.py").write_text(PARTS.replace("% 5", "% 4"))
    changed = attempt(tmp_path, "parted", environment, *SETTINGS, "trainer.steps=3")
    assert changed.code == 2 and "checkpoint.allow_changed=reward.functions" in changed.text, changed.text[-2000:]
