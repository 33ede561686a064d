"""A run says in words what deserves attention: each sentence appears beyond its limit only."""

from __future__ import annotations

import json

import pytest

from megatron_g2rl.tracking.health import WINDOW, RecentHealth, health
from megatron_g2rl.tracking.status import Status
from megatron_g2rl.tracking.table import unknown_names

GOOD = {
    "reward/groups_used_fraction": 0.8,
    "reward/pass_rate": 0.5,
    "response/truncated_fraction": 0.1,
    "response/unparsed_fraction": 0.2,
    "response/repetitive_fraction": 0.01,
    "response/confidently_incorrect_fraction": 0.1,
    "mismatch/kl": 1e-4,
    "reward/timeouts": 0.0,
    "reward/worker_crashes": 0.0,
    "update/skipped": 0.0,
    "time/step_s": 10.0,
    "time/rollout_s": 5.0,
}


def test_a_good_run_has_nothing_to_report_and_all_names_are_metrics():
    assert health([GOOD, GOOD]) == health([]) == health([{}]) == []
    assert not unknown_names(GOOD)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reward/groups_used_fraction": 0.3, "reward/pass_rate": 0.1}, "70% of the groups have equal rewards"),
        ({"reward/groups_used_fraction": 0.3, "reward/pass_rate": 0.1}, "too hard"),
        ({"reward/groups_used_fraction": 0.3, "reward/pass_rate": 0.9}, "too easy"),
        ({"response/truncated_fraction": 0.5}, "50% of the responses reach rollout.max_response_tokens"),
        ({"response/unparsed_fraction": 0.6}, "50% of the responses are complete but have no final answer"),
        ({"response/repetitive_fraction": 0.1}, "10% of the responses end in a loop"),
        ({"response/confidently_incorrect_fraction": 0.6}, "60% of the problems, most responses agree"),
        ({"mismatch/kl": 0.05}, "KL 0.05 nats per token"),
        ({"reward/timeouts": 3.0}, "3 reward calls per step exceed reward.deadline_s"),
        ({"update/skipped": 0.5}, "0.5 updates per step are skipped"),
        ({"time/rollout_s": 9.0}, "idle for 90% of a step"),
    ],
)
def test_each_sentence_appears_beyond_its_limit(changes, sentence):
    (found,) = health([GOOD | changes])
    assert sentence in found


def test_means_over_steps_count_and_values_that_are_not_finite_are_ignored():
    bad = GOOD | {"response/truncated_fraction": 0.4}
    assert health([bad, bad, GOOD]) and not health([bad, GOOD, GOOD, GOOD, GOOD])
    assert health([GOOD | {"mismatch/kl": float("nan"), "reward/timeouts": None}]) == []


def test_only_the_last_steps_count_and_the_status_has_the_sentences(tmp_path):
    recent, status = RecentHealth(), Status(tmp_path)
    status.health = recent.add(GOOD | {"update/skipped": 1.0})
    status.write("rollout", step=1)
    assert "are skipped" in json.loads((tmp_path / "status.json").read_text())["health"]
    for _ in range(WINDOW):
        status.health = recent.add(GOOD)
    status.write("rollout", step=2)
    assert json.loads((tmp_path / "status.json").read_text())["health"] == ""
