"""The files of docs/extending.md, copied from the page, train together and do what the page describes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from documented_code import REPOSITORY, documented_files, write_documented_files
from random_models import write_random_model
from safetensors.torch import load_file
from training_runs import attempt, read_metrics, train

from tools.fuzz.forking import ForkedCommand, Outcome, run_forked

PAGE = "docs/extending.md"
OWN = {
    "exploration.mapping": "most_novel:most_novel",
    "algorithm.baseline": "shrunk_mean:shrunk_mean",
    "reward.function": "closeness:closeness",
    "rollout.engine": "plain_engine:from_config",
}
SETTINGS = ["trainer.steps=2", "checkpoint.every_steps=1", "logging.responses_every_steps=1"]
SETTINGS += ["exploration.strength=0.5", "optimizer.learning_rate=1e-3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_documented_files(PAGE, tmp_path_factory.mktemp("extending"))


@pytest.fixture(scope="module")
def own_run(folder, environment) -> list[dict]:
    return train(folder, "own", environment, *SETTINGS, *(f"{key}={path}" for key, path in OWN.items()))


def test_the_page_shows_the_command_of_this_test():
    text = (REPOSITORY / PAGE).read_text()
    assert all(f"{key}={path}" in text for key, path in OWN.items())
    assert {path.partition(":")[0] + ".py" for path in OWN.values()} < set(documented_files(PAGE))


@pytest.mark.same_for_both
def test_a_method_of_ones_own_scores_the_mean_hidden_states(folder, environment):
    train(folder, "method", environment, *SETTINGS, "exploration.method=shortness:SHORTNESS")
    rows = read_metrics(folder / "method", "responses.jsonl")
    for step in (0, 1):
        novelty = [row["novelty"] for row in rows if row["step"] == step]
        # the shortest state of a group has exactly 1, and the files have the most and the least novel responses
        assert max(novelty) == 1.0 and 0 < min(novelty) < 1


@pytest.mark.same_for_both
def test_an_engine_of_ones_own_samples_with_the_policys_weights_at_every_step(own_run):
    assert [line["step"] for line in own_run] == [0, 1]
    # float32, another implementation; a learning rate of 1e-3 moves log-probs by far more in one step
    assert all(line["mismatch/logprob_difference_max"] < 1e-4 for line in own_run)


def functions_of(name: str) -> dict:
    namespace: dict = {}
    exec(documented_files(PAGE)[name], namespace)
    return namespace


def test_the_documented_mapping_and_baseline_have_the_values_of_a_worked_case():
    scores, rewards = torch.tensor([0.2, 0.6, 0.4, 0.9]), torch.tensor([1.0, 1.0, 0.5, -1.0])
    most_novel = functions_of("most_novel.py")["most_novel"]
    assert most_novel(scores, rewards).tolist() == [0, 1, 0, 0]
    assert most_novel(scores, -rewards).tolist() == [0, 0, 0, 1]
    assert most_novel(scores, -rewards.abs()).tolist() == [0, 0, 0, 0]
    assert functions_of("shrunk_mean.py")["shrunk_mean"](torch.tensor([1.0, 1.0, -1.0])).item() == 0.25


@pytest.mark.same_for_both
def test_rewards_and_shaped_rewards_are_those_of_the_documented_functions(own_run, folder):
    closeness, factors = functions_of("closeness.py")["closeness"], []
    rows = read_metrics(folder / "own", "responses.jsonl")
    for step in (0, 1):
        group = [row for row in rows if row["step"] == step]
        # responses.jsonl has the responses with the highest and the lowest score of a group
        least, most = (choose(row["novelty"] for row in group) for choose in (min, max))
        assert least < most
        for row in group:
            reward, correct = closeness(row["response"], row["answer"])
            assert (row["reward"], row["correct"]) == (pytest.approx(reward, abs=1e-6), correct)
            factor = row["shaped"] / row["reward"]
            scaled = row["novelty"] == most and row["reward"] > 0
            assert factor == pytest.approx(1.0, abs=1e-5) or (scaled and factor == pytest.approx(1.5, abs=1e-5))
            factors.append(factor)
    assert max(factors) > 1.4
    assert all(line["reward/shaped_mean"] > line["reward/mean"] + 0.01 for line in own_run)


@pytest.mark.same_for_both
def test_the_registered_engine_samples_the_same_responses_and_another_baseline_changes_the_update(
    own_run, folder, environment
):
    registered = OWN | {"rollout.engine": "transformers", "algorithm.baseline": "group_mean"}
    reference = train(folder, "reference", environment, *SETTINGS, *(f"{k}={v}" for k, v in registered.items()))
    for name in ("reward/mean", "reward/shaped_mean", "response_length/mean", "exploration/novelty_mean"):
        assert own_run[0][name] == pytest.approx(reference[0][name], rel=1e-4), name
    # the two engines round log-probs differently, by 1e-6
    assert own_run[0]["update/gradient_norm"] != pytest.approx(reference[0]["update/gradient_norm"], rel=5e-5)


@pytest.mark.same_for_both
def test_a_changed_mapping_is_refused_when_the_run_resumes(own_run, folder, environment):
    file = folder / "most_novel.py"
    unchanged = file.read_text()
    file.write_text(unchanged.replace("] = 1", "] = 0.9"))
    try:
        settings = [*SETTINGS, *(f"{key}={path}" for key, path in OWN.items()), "trainer.steps=3"]
        outcome = attempt(folder, "own", environment, *settings)
    finally:
        file.write_text(unchanged)
    assert outcome.code == 2 and "checkpoint.allow_changed=exploration.mapping" in outcome.text, outcome.text[-2000:]


def test_a_family_of_ones_own_computes_what_transformers_computes(folder, environment):
    done = subprocess.run(
        [sys.executable, "check_family.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(re.search(r"largest difference of a log-prob: (\S+)", done.stdout)[1]) < 1e-5


def test_a_wrong_table_does_not_pass_the_documented_check(tmp_path, environment):
    table = write_documented_files(PAGE, tmp_path) / "mixtral_family.py"
    right = '(HF_EXPERT + "w1.weight", HF_EXPERT + "w3.weight")'
    assert right in table.read_text()
    table.write_text(table.read_text().replace(right, '(HF_EXPERT + "w3.weight", HF_EXPERT + "w1.weight")'))
    check = ForkedCommand(
        [],
        tmp_path,
        tmp_path / "output",
        environment=environment,
        before=lambda: sys.path.insert(0, str(tmp_path)),  # as when Python runs the file
        script=tmp_path / "check_family.py",
    )
    assert check.wait(300) != 0 and "the table does not describe this model" in check.read()


def test_a_family_of_ones_own_is_converted_and_comes_back_bit_for_bit(tmp_path):
    folder = write_documented_files(PAGE, tmp_path)

    def convert(*arguments: str) -> Outcome:
        # In a process of its own: the process groups of a conversion here would hang later tests that fork.
        return run_forked(["convert", *arguments], folder, tmp_path / "output", limit_s=200)

    source = write_random_model(tmp_path / "mixtral", "mixtral", noise=0.2, num_local_experts=4)
    refused = convert("hf-to-megatron", source, str(tmp_path / "refused"))
    assert refused.code == 1 and "set model.family" in refused.text
    there, back = str(tmp_path / "converted"), str(tmp_path / "back")
    for arguments in (["hf-to-megatron", source, there], ["megatron-to-hf", there, back]):
        done = convert(*arguments, "--family", "mixtral_family:MIXTRAL")
        assert done.code == 0, done.text
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (source, back))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any("block_sparse_moe.experts.3.w2" in name for name in after)
