"""A run that is killed, corrupted or changed resumes as if uninterrupted, or reports the error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from quickstart_model import quickstart_model
from training_runs import attempt, read_metrics, read_status, start, train, without_times

# An untrained model is never correct; by this reward it sometimes is.
REWARD = "reward.function=odd_reward:odd"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, environment) -> Path:
    """A folder with a run of three steps: a checkpoint each, an export after the second."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "odd_reward.py").write_text("def odd(text, answer):\n    return 1.0 if len(text) % 2 else -1.0\n")
    every = ["checkpoint.every_steps=1", "checkpoint.export_hf_every=2", "evaluation.every_steps=1"]
    train(folder, "run", environment, "trainer.steps=3", REWARD, *every)
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_a_run_killed_three_times_ends_like_an_uninterrupted_one(tmp_path, run_tool, capsys):
    options = ["--kills", "3", "--phases", "rollout,checkpoint,update", "--folder", str(tmp_path / "chaos")]
    settings = [f"model.path={quickstart_model()}", "rollout.max_response_tokens=12"]
    code = run_tool("chaos", *options, "--", *settings)
    output = capsys.readouterr()
    assert code == 0, output.out[-3000:] + output.err[-3000:]
    assert "equal to the undisturbed run: 6 metrics.jsonl lines" in output.out


@pytest.mark.same_for_both
def test_an_export_is_the_same_model_in_transformers_and_in_vllm(finished, environment):
    exported = finished / "run" / "hf" / "step_00000002"
    program = """if True:
    import sys, torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import LLM, SamplingParams
    path = sys.argv[1]
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = tokenizer("3 + 4", add_special_tokens=False).input_ids + [0]
    llm = LLM(path, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=64)
    settings = SamplingParams(max_tokens=1, prompt_logprobs=0)
    output = llm.generate([{"prompt_token_ids": ids}], settings, use_tqdm=False)[0]
    vllm = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:])]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logits.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    print("largest difference", (torch.tensor(vllm) - expected).abs().max().item())
    """
    extra = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")
    options = dict(env=environment | extra, capture_output=True, text=True, timeout=200)
    result = subprocess.run([sys.executable, "-c", program, str(exported)], **options)
    assert "largest difference" in result.stdout, result.stderr[-3000:]
    # a different order of float32 sums
    assert float(result.stdout.split("largest difference")[1].split()[0]) < 1e-4


def test_the_checkpoint_of_the_best_evaluation_is_kept(finished):
    run = finished / "run"
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    evaluations = [line for line in read_metrics(run, "evaluation.jsonl") if line["step"] > 0]
    highest = max(line["evaluation/pass_at_1"] for line in evaluations)
    step = int(best["checkpoint"].removeprefix("step_"))
    saved = {path.name for path in (run / "checkpoints").glob("step_*")}
    assert best["pass_at_1"] == highest == next(x["evaluation/pass_at_1"] for x in evaluations if x["step"] == step)
    assert step > 0 and saved == {"step_00000002", "step_00000003", best["checkpoint"]}


def test_leftovers_of_a_kill_are_repaired_at_the_next_start(copy, environment):
    """A kill between the last evaluation and best.json, and one in the middle of an export."""
    best, exporting = copy / "run" / "checkpoints" / "best.json", copy / "run" / ".partial_model"
    before = best.read_text()
    best.unlink()
    exporting.mkdir()
    every = ["checkpoint.every_steps=1", "evaluation.every_steps=1"]
    train(copy, "run", environment, "trainer.steps=3", REWARD, *every)
    assert best.read_text() == before and not exporting.exists()


def test_a_corrupt_checkpoint_is_reported_and_the_previous_one_loaded_on_request(copy, environment):
    latest = copy / "run" / "checkpoints" / "step_00000003"
    shard = max((latest / "megatron").glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    before = without_times(read_metrics(copy / "run"))
    result = attempt(copy, "run", environment, REWARD, "trainer.steps=4")
    assert result.code == 1 and "Traceback" not in result.text
    assert shard.name in result.text and "checkpoint.on_corruption=previous" in result.text
    metrics = train(copy, "run", environment, REWARD, "trainer.steps=4", "checkpoint.on_corruption=previous")
    assert without_times(metrics)[:3] == before and len(metrics) == 4
    assert len(list((copy / "run" / "checkpoints").glob("damaged_step_00000003*"))) == 1


def test_a_change_that_makes_it_another_run_is_refused_before_any_file_changes(copy, environment):
    changed = ["trainer.group_size=8", "optimizer.learning_rate=1e-3"]
    result = attempt(copy, "run", environment, REWARD, "trainer.steps=4", *changed)
    assert result.code == 2 and "trainer.group_size: 4 -> 8" in result.text
    assert "checkpoint.allow_changed=trainer.group_size" in result.text and "Traceback" not in result.text
    assert len(read_metrics(copy / "run")) == 3


@pytest.mark.same_for_both
def test_a_second_run_in_the_folder_is_refused_and_the_first_continues(tmp_path, environment):
    (first,) = start(tmp_path, "run", environment, "trainer.steps=500")
    try:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and not read_status(tmp_path / "run").get("step"):
            time.sleep(0.05)
        result = attempt(tmp_path, "run", environment)
        assert result.code == 1 and f'"process": {first.pid}' in result.text and "in use" in result.text
        steps = read_status(tmp_path / "run")["step"]
        first.send_signal(signal.SIGUSR1)
        assert first.wait(60) == 75 and read_status(tmp_path / "run")["step"] >= steps
    finally:
        first.kill()


def test_a_run_stops_when_its_time_limit_is_reached_and_then_resumes(tmp_path, environment):
    result = attempt(tmp_path, "run", environment, "trainer.stop_after=1s")
    assert result.code == 75 and "trainer.stop_after=1s has elapsed" in result.text
    assert os.path.isdir(tmp_path / "run" / "checkpoints" / "step_00000000")
    assert len(train(tmp_path, "run", environment, "trainer.steps=1")) == 1


def test_another_run_can_start_from_the_checkpoint_of_a_finished_one(finished, tmp_path, environment):
    """A checkpoint is a Megatron folder, and `model.path` takes one."""
    checkpoint = finished / "run" / "checkpoints" / "step_00000003"
    options = [f"model.path={checkpoint}", "trainer.steps=1", "optimizer.learning_rate=1e-30"]
    train(tmp_path, "other", environment, *options)
    from safetensors.torch import load_file

    old, new = (
        load_file(next((run / "model").glob("*.safetensors"))) for run in (finished / "run", tmp_path / "other")
    )
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
