"""`g2rl warm-start`: an ordinary model folder, complete or absent, the same for the same settings."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.fuzz.forking import ForkedCommand, Outcome, fork_ranks, run_forked, wait_for_all

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "model.yaml"
SMALL = ["steps=6", "demonstrations_per_step=4"]
RECORD = "warm_start.json"


def warm_start(folder: Path, *overrides: str, config: Path = QUICKSTART) -> Outcome:
    arguments = ["warm-start", str(config), *SMALL, *overrides]
    return run_forked(arguments, folder, folder / "output", limit_s=200, environment={"OMP_NUM_THREADS": "1"})


def weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the command has created models/quickstart."""
    folder = tmp_path_factory.mktemp("warm")
    outcome = warm_start(folder)
    assert outcome.code == 0, outcome.text
    lines = [line.partition(" | ")[0] for line in outcome.text.splitlines()]
    assert lines[:2] == ["warm start 1/6", "warm start 6/6"] and lines[2].startswith("wrote models/quickstart in ")
    return folder


@pytest.fixture(scope="module")
def model(place) -> Path:
    return place / "models" / "quickstart"


def test_the_model_loads_in_transformers_and_knows_the_task_better_than_its_random_weights(model, tmp_path):
    from megatron_g2rl.data.tiny_model import demonstrations, make_tiny_model
    from megatron_g2rl.registry import TASKS

    task = TASKS["arithmetic"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = demonstrations(task, tokenizer, 4, seed=9)

    def loss(folder: Path) -> float:
        network, total = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.0
        for prompt, response in examples:
            ids = torch.tensor([[*prompt.token_ids, *response]])
            labels = torch.tensor([[-100] * len(prompt.token_ids) + response])
            with torch.inference_mode():
                total += network(ids, labels=labels).loss.item() / len(examples)
        return total

    assert loss(model) < 0.9 * loss(make_tiny_model(tmp_path / "random", task=task, seed=0))


def test_the_same_settings_give_the_same_bits_in_another_folder(model, tmp_path):
    assert warm_start(tmp_path, "output=elsewhere/again").code == 0
    assert contents(tmp_path / "elsewhere" / "again") == contents(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "output"]


def test_a_folder_that_holds_the_result_is_left_alone(place, model):
    before = {file: file.stat().st_mtime_ns for file in model.iterdir()}
    outcome = warm_start(place, "ranks=1", "tokens_per_microbatch=2000")
    assert (outcome.code, outcome.text) == (0, "models/quickstart already holds this model\n")
    assert {file: file.stat().st_mtime_ns for file in model.iterdir()} == before


def test_a_folder_that_holds_the_result_of_other_settings_is_refused_with_the_difference(place, model):
    before = contents(model)
    outcome = warm_start(place, "seed=1", "policy.precision=bf16")
    assert outcome.code == 2 and outcome.text.splitlines() == [
        "output=models/quickstart holds the result of other settings: choose another output, or remove it:",
        "  - seed: 0 -> 1",
        "  - policy.precision: fp32 -> bf16",
    ]
    assert contents(model) == before


@pytest.mark.parametrize("name, words", [("notes.txt", "was not written by g2rl warm-start"), (RECORD, "is corrupt")])
def test_a_folder_with_anything_else_is_refused_and_unchanged(tmp_path, name, words):
    output = tmp_path / "models" / "quickstart"
    output.mkdir(parents=True)
    (output / name).write_text("mine")
    outcome = warm_start(tmp_path)
    assert outcome.code == 2 and len(outcome.text.splitlines()) == 1, outcome.text
    assert "output=models/quickstart" in outcome.text and words in outcome.text
    assert contents(output) == {name: b"mine"} and list(output.parent.iterdir()) == [output]


def test_a_command_that_was_killed_leaves_no_model_and_the_next_one_creates_it(model, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = ["warm-start", str(QUICKSTART), "steps=500", "demonstrations_per_step=4"]
    killed = ForkedCommand(arguments, tmp_path, tmp_path / "killed", environment=environment)
    deadline = time.monotonic() + 200
    while "warm start 1/500" not in killed.read():
        assert killed.poll() is None and time.monotonic() < deadline, killed.read()
        time.sleep(0.02)
    second = warm_start(tmp_path, "steps=500")
    assert second.code == 1 and "another process is creating this model" in second.text, second.text
    killed.kill()
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".partial_quickstart"]
    assert warm_start(tmp_path).code == 0
    assert contents(tmp_path / "models" / "quickstart") == contents(model)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["quickstart"]


@pytest.mark.parametrize("size", ["64k", "1m", "3500k"])
def test_a_full_disk_is_one_message_and_leaves_no_model(size, tmp_path):
    disk = tmp_path / "models"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", str(disk)]).returncode:
        pytest.skip("a file system of this size cannot be mounted here: needs root")
    try:
        outcome = warm_start(tmp_path)
        assert outcome.code == 1 and "No space left" in outcome.text and "models/quickstart" in outcome.text
        assert "Traceback" not in outcome.text and not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("layout", [[], ["policy.tensor_parallel=2"]], ids=["dp2", "tp2"])
def test_two_ranks_create_the_same_model(model, tmp_path, layout):
    command, environment = ["warm-start", str(QUICKSTART), *SMALL, *layout], os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = fork_ranks(2, command, tmp_path, tmp_path / "output", environment)
    assert wait_for_all(ranks, 200) == [0, 0], "".join(rank.read() for rank in ranks)
    assert len(ranks[0].read().splitlines()) == 3 and ranks[1].read() == "", "rank 0 reports for all"
    one, two = weights(model), weights(tmp_path / "models" / "quickstart")
    assert one.keys() == two.keys()
    for name in one:
        # Adam enlarges rounding where the second moment is small; six steps move a weight by about 1e-2.
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-3)


def test_an_existing_model_is_fine_tuned_further_and_its_contents_are_part_of_the_settings(model, tmp_path):
    settings = [f"model={{path: {model}}}", "learning_rate=1e-4", "output=further"]
    assert warm_start(tmp_path, *settings).code == 0
    before, after = weights(model), weights(tmp_path / "further")
    assert before.keys() == after.keys() and not all(torch.equal(before[name], after[name]) for name in before)
    assert "already holds" in warm_start(tmp_path, *settings).text
    changed = warm_start(tmp_path, f"model={{path: {tmp_path / 'further'}}}", *settings[1:])
    assert changed.code == 2 and "- model: " in changed.text, changed.text


@pytest.mark.parametrize(
    "override, words",
    [
        ("stesp=3", ("unknown key stesp. Nearest valid key: steps",)),
        ("task=chess", ("task = 'chess' is not allowed", "arithmetic")),
        ("mixed_with=sorting,chess", ("mixed_with", "names 'chess'; the built-in tasks are", "countdown")),
        ("learning_rate=0", ("learning_rate = 0 is not allowed", "number > 0")),
        ("model.path=./nowhere", ("model.path=./nowhere: there is no such folder",)),
        ("policy.tensor_parallel=2", ("policy.tensor_parallel", "does not divide the 1 ranks", "(ranks, torchrun")),
        ("tokens_per_microbatch=20", ("tokens_per_microbatch=20", "raise it")),
        ("output=output/model", ("output=output/model", "Not a directory")),
        ("policy.device=cuda", ("policy.device=cuda", "no CUDA device")),
    ],
)
def test_an_invalid_setting_is_one_message_that_names_the_key(tmp_path, override, words):
    outcome = warm_start(tmp_path, override)
    assert outcome.code in (1, 2) and "Traceback" not in outcome.text, outcome.text
    assert all(word in outcome.text for word in words), outcome.text
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("output", "models")]
