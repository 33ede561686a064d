"""A training that is longer than its job's time limit, on a real Slurm: nobody but Slurm signals it."""

from __future__ import annotations

import os

import pytest
from slurm_jobs import CONFIG, ended, metrics, settings

SLOW = """
import os
import time

from megatron_g2rl.rewards import math_reward


def slow_reward(text: str, answer: str) -> float:
    time.sleep(0 if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else 1.5)
    return math_reward(text, answer)
"""
"""Twelve seconds a step in the first attempt, and the rewards of the uninterrupted run."""


@pytest.mark.skipif(
    "G2RL_SLOW_TESTS" not in os.environ,
    reason="waits for a real limit, and Slurm may signal while the model is loading: set G2RL_SLOW_TESTS=1",
)
def test_a_run_that_is_longer_than_the_time_limit_ends_with_the_metrics_of_an_uninterrupted_one(
    g2rl, nemo_run, expected, tmp_path
):
    (tmp_path / "slow.py").write_text(SLOW)
    words = [*settings(tmp_path), "reward.function=slow:slow_reward", "trainer.steps=6"]
    # Slurm signals between 10 s and 70 s after the start, most often after 40 s.
    process = g2rl("launch", str(CONFIG), "--cluster", "site.yaml", "--wait", *words, time="2", stop_before_end_s=50)
    code, said = ended(process, 300)
    assert code == 0, said
    attempts = [line.split("\t") for line in (tmp_path / "run" / "launch" / "attempts.tsv").read_text().splitlines()]
    assert len(attempts) >= 2 and attempts[0][2] == "75", attempts
    assert metrics(tmp_path / "run") == expected
