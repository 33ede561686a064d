"""`g2rl train` from the command line: the complete loop without stand-ins, on one rank and on two, stopped and resumed.

One run per way of starting is a separate interpreter; the others are forked, with the same command line.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from training_runs import (
    attempt,
    command,
    read_metrics,
    read_status,
    train,
    train_by_command,
    without_times,
)

from megatron_g2rl.rollout import vllm_compat
from megatron_g2rl.tracking.table import unknown_names


@pytest.fixture(scope="module")
def one_rank_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("one")


@pytest.fixture(scope="module")
def one_rank(one_rank_folder, environment) -> list[dict]:
    return train_by_command(one_rank_folder, "run", environment)


def test_every_metric_of_a_run_is_documented_and_a_few_responses_are_logged(one_rank, one_rank_folder):
    assert not unknown_names({name for line in one_rank for name in line} - {"step"})
    responses = [json.loads(line) for line in (one_rank_folder / "run" / "responses.jsonl").read_text().splitlines()]
    assert {row["step"] for row in responses} == {0} and 1 <= len(responses) <= 4
    assert all(0 <= row["novelty"] <= 1 and row["reward"] in (-1, 1) and row["prompt"] for row in responses)
    assert list((one_rank_folder / "run" / "tensorboard").glob("events.out.*"))


def test_one_rank_generates_scores_and_updates(one_rank):
    assert [line["step"] for line in one_rank] == [0, 1, 2, 3]
    for line in one_rank:
        assert line["update/count"] == 2 and line["update/skipped"] == 0
        assert line["update/gradient_norm"] > 0
        assert 0 <= line["exploration/novelty_mean"] <= 1
        # The rollout engine has the trainer's weights: a different implementation, float32, log-probs of order 1.
        assert line["mismatch/logprob_difference_max"] < 1e-4
    # Weights have changed, so the KL to the reference is not zero.
    assert one_rank[0]["update/kl"] < one_rank[-1]["update/kl"]


@pytest.mark.parametrize(
    "layout",
    [
        ["policy.tensor_parallel=2", "policy.sequence_parallel=true"],
        ["policy.pipeline_parallel=2"],
        ["policy.context_parallel=2", "algorithm.ratio=sequence"],
        [],
    ],
    ids=["tp2_sp", "pp2", "cp2_sequence_ratio", "dp2"],
)
def test_two_ranks_train_like_one(layout, tmp_path, environment, one_rank):
    found = train(tmp_path, "run", environment, "trainer.steps=2", *layout, ranks=2)
    names = ["reward/mean", "response_length/mean", "policy/entropy"]
    names += ["exploration/novelty_mean", "geometry/mean_cosine"]
    if "algorithm.ratio=sequence" not in layout:
        names += ["update/gradient_norm", "update/kl"]
    for name in names:
        # Step 0 has the same numbers in another summation order; afterwards rounding may change a sampled token.
        assert found[0][name] == pytest.approx(one_rank[0][name], rel=1e-3, abs=1e-6), name


def assert_same_exploration(found: dict, expected: dict) -> None:
    """Metrics computed from Φ, where the rollout engine's top K is the full vocabulary of 128 tokens."""
    for name in ("novelty_mean", "novelty_incorrect"):
        # Log-probs have half precision; 3e-6 is observed.
        assert found[f"exploration/{name}"] == pytest.approx(expected[f"exploration/{name}"], abs=1e-4)
    for name in ("mean_cosine", "effective_rank", "cosine_p10", "cosine_p90"):
        # 5e-5 is observed: a single cosine near 0 is most sensitive to rounding.
        assert found[f"geometry/{name}"] == pytest.approx(expected[f"geometry/{name}"], abs=1e-3)
    assert found["reward/shaped_mean"] == pytest.approx(expected["reward/shaped_mean"], abs=1e-4)
    assert found["policy/entropy"] == pytest.approx(expected["policy/entropy"], rel=1e-5)


def test_top_k_of_the_full_vocabulary_explores_like_the_old_log_prob_pass(tmp_path, environment, one_rank):
    options = ["exploration.source=sampler_topk", "exploration.top_k=128", "trainer.steps=1"]
    (found,) = train(tmp_path, "run", environment, *options)
    assert_same_exploration(found, one_rank[0])
    for line in (found, *one_rank):
        parts = [line[f"cost/{name}_s"] for name in ("features", "reduce", "shaping")]
        assert min(parts) >= 0 and sum(parts) == pytest.approx(line["cost/exploration_s"])
        assert 0 < line["cost/step_fraction"] < 1
    # Both engines compute in float32: 1e-5 nats of difference are far below the tolerance.
    assert all(line["exploration/swept_again_fraction"] == 0 for line in one_rank)
    assert "exploration/swept_again_fraction" not in found


def test_a_run_of_one_update_per_step_learns_the_same_without_an_old_log_prob_pass_and_resumes(tmp_path, environment):
    one_update = ["trainer.responses_per_update=16", "algorithm.drop_uniform_groups=true", "checkpoint.every_steps=2"]
    fused = train(tmp_path, "run", environment, *one_update)
    assert not unknown_names({name for line in fused for name in line} - {"step"})
    (scored,) = train(tmp_path, "scored", environment, *one_update, "exploration.source=exact", "trainer.steps=1")
    assert fused[0].keys() == scored.keys()
    (expected,) = without_times([scored])
    for name, value in expected.items():
        if value is None or name == "update/learning_rate":  # its schedule has another length
            assert (fused[0][name] is None) == (value is None)
        else:
            assert fused[0][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert all(line["cost/features_s"] > 0 and line["update/count"] == 1 for line in fused)

    copy = Path(shutil.copytree(tmp_path, tmp_path / "copy"))
    for later in ("checkpoints/step_00000004", "model"):
        shutil.rmtree(copy / "run" / later)
    outcome = attempt(copy, "run", environment, *one_update)
    assert outcome.code == 0 and "after 2 steps" in outcome.text, outcome.text[-4000:]
    assert without_times(read_metrics(copy / "run")) == without_times(fused)
    for file in (tmp_path / "run" / "model").glob("*.safetensors"):
        assert file.read_bytes() == (copy / "run" / "model" / file.name).read_bytes()


VLLM = ["rollout.engine=vllm", "rollout.kv_cache_mb=64", "optimizer.learning_rate=1e-2"]


@pytest.fixture(scope="module")
def one_vllm_rank(tmp_path_factory, environment) -> list[dict]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: docs/install.md")
    folder = tmp_path_factory.mktemp("vllm")
    metrics = train_by_command(folder, "run", environment, "trainer.steps=3", *VLLM)
    vllm_compat.import_vllm()  # once for all forked runs
    return metrics


@pytest.mark.vllm
def test_vllm_generates_inside_the_training_ranks_with_the_current_weights(one_vllm_rank, tmp_path, environment):
    # The second run estimates Φ from a small K, on two replicas.
    options = ["policy.tensor_parallel=2", "exploration.source=sampler_topk", "exploration.top_k=4", "trainer.steps=3"]
    for line in [*one_vllm_rank, *train(tmp_path, "run", environment, *VLLM, *options, ranks=2)]:
        # After updates of 1e-2 stale weights would be off by more than 0.1 nats.
        assert line["mismatch/logprob_difference_max"] < 2e-3
        assert line["response_length/mean"] > 0
        assert 0 < line["exploration/novelty_mean"] <= 1


@pytest.mark.same_for_both
@pytest.mark.vllm
def test_top_k_of_vllms_full_vocabulary_explores_like_the_old_log_prob_pass(one_vllm_rank, tmp_path, environment):
    options = ["exploration.source=sampler_topk", "exploration.top_k=128", "trainer.steps=1"]
    (found,) = train(tmp_path, "run", environment, *VLLM, *options)
    assert_same_exploration(found, one_vllm_rank[0])


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        pytest.param(signal.SIGTERM, 1, id="term_1"),
        pytest.param(signal.SIGINT, 2, id="ctrl_c_2", marks=pytest.mark.same_for_both),
    ],
)
def test_a_stopped_run_resumes_as_if_it_had_not_been_stopped(number, ranks, tmp_path, environment, one_rank):
    overrides, log = [f"trainer.ranks={ranks}"], tmp_path / "stopped.log"
    with log.open("w") as output:
        options = dict(env=environment, stderr=output, cwd=tmp_path)
        process = subprocess.Popen(command(tmp_path, "run", *overrides), **options)
    try:
        status, deadline = {}, time.monotonic() + 200
        while time.monotonic() < deadline and not status.get("step"):
            assert process.poll() is None, log.read_text()[-4000:]
            status = read_status(tmp_path / "run")
            time.sleep(0.005)
        process.send_signal(number)
        assert process.wait(timeout=600) == 75, log.read_text()[-4000:]
    finally:
        process.kill()
    assert "s after the request" in log.read_text() and read_status(tmp_path / "run")["phase"] == "stopped"
    steps = len(read_metrics(tmp_path / "run"))
    assert 1 <= steps < 4 and (tmp_path / "run" / "checkpoints" / f"step_{steps:08d}").is_dir()
    found = without_times(train(tmp_path, "run", environment, *overrides, ranks=ranks))
    if ranks == 1:
        assert found == without_times(one_rank)
    assert [line["step"] for line in found] == [0, 1, 2, 3]
    evaluations = read_metrics(tmp_path / "run", "evaluation.jsonl")
    assert [line["step"] for line in evaluations] == [0, 2, 4]
    assert all(0 <= line["evaluation/pass_at_1"] <= line["evaluation/pass_at_2"] <= 1 for line in evaluations)


@pytest.mark.same_for_both
def test_dynamic_sampling_replaces_uniform_groups(tmp_path, environment):
    options = ["exploration.method=none", "algorithm.drop_uniform_groups=true", "algorithm.dynamic_sampling_rounds=2"]
    found = train(tmp_path, "run", environment, *options, "trainer.steps=1")
    # An untrained model is always incorrect: all groups are uniform, both rounds are drawn, no update is made.
    assert found[0]["update/count"] == 0 and found[0]["reward/groups_used_fraction"] == 0
    assert found[0]["reward/pass_rate"] == 0
    assert found[0]["response/count"] == (1 + 2) * 4 * 4


def test_the_exported_model_of_a_finished_run_loads_in_transformers(tmp_path, environment):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(tmp_path, "run", environment, "trainer.steps=1", "policy.pipeline_parallel=2", ranks=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model.get_input_embeddings().num_embeddings >= len(tokenizer) and tokenizer.chat_template


@pytest.mark.same_for_both
def test_a_failing_reward_function_ends_the_run_with_its_name_and_no_internal_traceback(tmp_path, environment):
    (tmp_path / "my_rewards.py").write_text("def broken(text, answer):\n    return float(answer) / 0\n")
    for ranks in (1, 2):
        outcome = attempt(tmp_path, f"run{ranks}", environment, "reward.function=my_rewards:broken", ranks=ranks)
        assert outcome.code == 1
        assert "my_rewards:broken" in outcome.text and "ZeroDivisionError" in outcome.text
