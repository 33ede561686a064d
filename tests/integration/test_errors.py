"""Incorrect uses of `g2rl train`: each ends within seconds with one message that names the key or file and the remedy.

Every case is a real run of the command, in a process forked from one that has everything imported (0.3 s, not 7 s).
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from failing_runs import SCORE, SECONDS, Place, assert_one_message, train
from huggingface_hub import constants

from megatron_g2rl.distributed import ranks
from tools.fuzz.forking import ForkedCommand, fork_ranks, wait_for_all


@dataclass(frozen=True)
class Case:
    """One error of the user."""

    name: str
    expected: tuple[str, ...]
    """What the message must name: the key or file, and the remedy."""
    overrides: tuple[str, ...] = ()
    prepare: Callable[[Place], object] = lambda place: None
    config: str = "config.yaml"
    code: int = 1
    """1: the run ended with an error; 2: the configuration cannot be used."""


def changed(**settings: object) -> Callable[[Place], object]:
    return lambda place: place.change_model(**settings)


def launched_with(**variables: str) -> Callable[[Place], object]:
    return lambda place: place.environment.update(variables)


def broken_yaml(place: Place) -> None:
    place.write("a.yaml", "run: {a: \n")


def reward(text: str) -> Callable[[Place], object]:
    return lambda place: place.write("mine.py", text)


def truncate(file: str, size: int) -> Callable[[Place], object]:
    return lambda place: os.truncate(place.folder / file, size)


def take_a_port(place: Place) -> None:
    taken = place.closing.enter_context(socket.socket())
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = str(taken.getsockname()[1])
    place.environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def hide_vllm(place: Place) -> None:
    import importlib.util

    find = importlib.util.find_spec

    def hide() -> None:
        importlib.util.find_spec = lambda name, *rest: None if name == "vllm" else find(name, *rest)

    place.before = hide


def circle(place: Place) -> None:
    place.write("a.yaml", "base: b.yaml\n")
    place.write("b.yaml", "base: a.yaml\n")


def metrics_on_a_full_disk(place: Place) -> None:
    (place.folder / "runs" / "run").mkdir(parents=True)
    (place.folder / "runs" / "run" / "metrics.jsonl").symlink_to("/dev/full")


def checkpoint_on_a_full_disk(place: Place) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    place.before = limit


def broken_index(place: Place) -> None:
    place.write("model/model.safetensors.index.json", '{"weight_map": {"model.norm.weight": "gone.safetensors"}}')


def without_tokenizer(place: Place) -> None:
    for file in (place.folder / "model").glob("tokenizer*"):
        file.unlink()


CASES = [
    # the configuration
    Case("a_misspelt_key", ("trainer.stesp", "trainer.steps"), ("trainer.stesp=3",), code=2),
    Case("a_wrong_type", ("trainer.steps", "integer > 0"), ("trainer.steps=many",), code=2),
    Case("an_impossible_layout", ("policy.tensor_parallel=3", "divisor"), ("policy.tensor_parallel=3",), code=2),
    Case("bases_in_a_circle", ("cycle", "a.yaml -> b.yaml"), prepare=circle, config="a.yaml", code=2),
    Case("broken_yaml", ("a.yaml:2", "YAML"), prepare=broken_yaml, config="a.yaml", code=2),
    Case("a_missing_file", ("nowhere.yaml", "no such file"), config="nowhere.yaml", code=2),
    Case("a_folder_as_file", ("model", "directory"), config="model", code=2),
    # the machine
    Case("no_gpu", ("policy.device=cuda", "no CUDA device"), ("policy.device=cuda",), code=2),
    Case("no_vllm", ("rollout.engine=vllm", "pip install"), ("rollout.engine=vllm",), hide_vllm, code=2),
    Case("a_port_in_use", ("MASTER_PORT", "free"), prepare=take_a_port),
    Case("half_a_launcher", ("MASTER_ADDR",), prepare=launched_with(RANK="0", WORLD_SIZE="1")),
    Case("a_broken_launcher", ("WORLD_SIZE='x'",), prepare=launched_with(RANK="0", WORLD_SIZE="x"), code=2),
    # the model
    Case("no_model_folder", ("model.path=./nowhere", "no such folder"), ("model.path=./nowhere",), code=2),
    Case("no_such_hub_model", ("model.path=nobody/nothing", "Hugging Face Hub"), ("model.path=nobody/nothing",)),
    Case("no_weights", ("model", ".safetensors"), prepare=lambda p: (p.folder / "model/model.safetensors").unlink()),
    Case("a_model_of_another_kind", ("gpt2", "qwen3"), prepare=changed(model_type="gpt2")),
    Case("a_model_nobody_knows", ("model", "new99"), prepare=changed(model_type="new99")),
    Case("a_model_of_another_size", ("gate_proj", "(384, 128)"), prepare=changed(intermediate_size=96)),
    Case("a_broken_config_json", ("model/config.json", "JSON"), prepare=truncate("model/config.json", 20), code=2),
    Case("a_list_in_config_json", ("model/config.json",), prepare=lambda p: p.write("model/config.json", "[]"), code=2),
    Case("a_truncated_file", ("model.safetensors", "again"), prepare=truncate("model/model.safetensors", 900_000)),
    Case("a_lost_file", ("gone.safetensors", "again"), prepare=broken_index),
    Case("no_tokenizer", ("model", "tokenizer.json"), prepare=without_tokenizer),
    Case("a_broken_tokenizer", ("model", "tokenizer.json"), prepare=truncate("model/tokenizer.json", 20)),
    Case(
        "no_chat_template",
        ("chat template", "data.template=plain"),
        prepare=lambda p: (p.folder / "model/chat_template.jinja").unlink(),
    ),
    # the data
    Case("no_problems", ("problems.jsonl", "no rows"), prepare=truncate("problems.jsonl", 0)),
    Case("no_data", ("data.source=nowhere.jsonl",), ("data.source=nowhere.jsonl",), code=2),
    Case("no_such_column", ("data.prompt_column", "problem, answer"), ("data.prompt_column=question",)),
    Case("a_broken_line", ("problems.jsonl:2", "data.on_bad_row"), prepare=truncate("problems.jsonl", 50)),
    Case("a_long_prompt", ("problems.jsonl:1", "data.max_prompt_tokens=3"), ("data.max_prompt_tokens=3",)),
    Case("too_few_prompts", ("trainer.prompts_per_step=16",), ("trainer.prompts_per_step=16",), code=2),
    Case("no_such_task", ("data.source", "arithmetic"), ("data.source=builtin:chess",)),
    # the reward function
    Case("no_reward_module", ("reward.function=nomodule:score",), ("reward.function=nomodule:score",), code=2),
    Case("no_reward_function", ("reward.function", "score"), (SCORE,), reward("x = 1\n")),
    Case("a_reward_that_raises", ("mine.py:2", "ZeroDivisionError"), (SCORE,), reward("def score(t, a):\n  1/0\n")),
    Case("a_reward_of_nan", ("reward.function", "nan", "[-1, 1]"), (SCORE,), reward("score = lambda *_: 0 * 1e999\n")),
    Case("a_reward_that_is_no_python", ("mine.py", "line 1"), (SCORE,), reward("def score(t, a)\n")),
    # the disk
    Case("a_file_instead_of_the_runs", ("run.directory=runs",), prepare=lambda p: p.write("runs", ""), code=2),
    Case("an_unwritable_folder", ("run.directory=/proc/runs",), ("run.directory=/proc/runs",), code=2),
    Case(
        "a_full_disk",
        ("runs/run", "No space left", "Free disk space there. There is no ch"),
        prepare=metrics_on_a_full_disk,
    ),
    Case(
        "no_room_for_a_checkpoint",
        ("checkpoints", "disk space", "starts the run from the beginning"),
        prepare=checkpoint_on_a_full_disk,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_error_is_one_message_that_names_the_cause_and_the_remedy(case, place):
    case.prepare(place)
    outcome = train(place, *case.overrides, config=case.config)
    assert_one_message(outcome, case.code, case.expected)
    assert not list(place.folder.rglob("checkpoints/step_*")), "it came after a checkpoint"


@pytest.mark.same_for_both
def test_after_a_killed_rank_the_error_names_the_checkpoint_to_resume_from(place):
    place.write(
        "mine.py",
        # in a step, not when the function is smoke-tested on an empty and a correct-looking response
        "import os\ndef score(t, a):\n"
        "  if os.environ['RANK'] == '1' and t and 'boxed' not in t: os.kill(os.getppid(), 9)\n  return 1.0\n",
    )
    command = [sys.executable, "-m", "megatron_g2rl.cli", "train", "config.yaml", "trainer.ranks=2", SCORE]
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "another rank is lost" in done.stderr
    assert "the cause. There is no checkpoint yet: the same command starts" in done.stderr
    assert train(place, SCORE).code == 0
    # Ranks of another launcher.
    command = ["train", "config.yaml", SCORE, "trainer.steps=2"]
    ranks = fork_ranks(2, command, place.folder, place.folder / "rank", os.environ | place.environment)
    assert wait_for_all(ranks, SECONDS) == [1, -signal.SIGKILL]
    text = ranks[0].read()
    assert "Traceback" not in text, text
    assert "The same command resumes from step 1, the latest checkpoint (runs/run/ch" in text


@pytest.mark.same_for_both
def test_an_unreachable_hub_is_reported_with_one_message_by_two_ranks(place):
    def cannot_reach_the_hub() -> None:
        constants.ENDPOINT, constants.HF_HUB_OFFLINE = "http://127.0.0.1:9", False

    command = ["train", "config.yaml", "model.path=nobody/nothing"]
    output, environment = place.folder / "rank", os.environ | place.environment
    ranks = fork_ranks(2, command, place.folder, output, environment, before=cannot_reach_the_hub)
    assert wait_for_all(ranks, SECONDS) == [1, 1]
    (message,), (other,) = (rank.read().splitlines() for rank in ranks)
    assert other == f"rank 1: {message}"
    assert message.startswith("command line: model.path=nobody/nothing is not a folder (relative paths start at")
    assert "the Hugging Face Hub cannot be reached ([Errno 111] Connection refused). Pass a local folder" in message


LAUNCHERS = {
    "torchrun": dict(RANK="1", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="9"),
    "srun": dict(SLURM_PROCID="1", SLURM_LOCALID="0", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2"),
}
every_launcher = pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)


def run_as_rank_1(place, launcher: dict[str, str], seconds: float) -> ForkedCommand:
    """Start a run with a configuration error as rank 1 of two ranks of another launcher."""
    return ForkedCommand(
        ["train", "config.yaml", "trainer.stesp=3"],
        place.folder,
        place.folder / "output",
        environment=os.environ | place.environment | launcher,
        before=lambda: setattr(ranks, "FIRST_REPORT_S", seconds),
    )


@every_launcher
def test_another_rank_leaves_an_error_of_all_ranks_to_rank_0(place, launcher):
    rank = run_as_rank_1(place, launcher, SECONDS)
    time.sleep(3)
    assert rank.poll() is None
    os.kill(rank.pid, signal.SIGTERM)  # srun, after rank 0 has failed
    assert rank.wait(SECONDS) == -signal.SIGTERM and not rank.read()


@every_launcher
def test_another_rank_reports_a_configuration_error_that_rank_0_does_not_have(place, launcher):
    rank = run_as_rank_1(place, launcher, 0.1)
    assert rank.wait(SECONDS) == 2
    text = rank.read()
    assert text.startswith("rank 1: config.yaml is not a valid configuration:") and "trainer.stesp" in text, text


@pytest.mark.same_for_both
def test_an_error_on_all_ranks_is_reported_once(place):
    command = [sys.executable, "-m", "megatron_g2rl.cli", "train", "config.yaml", "trainer.ranks=2"]
    command += ["data.prompt_column=question"]
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    message = "data.prompt_column: problems.jsonl has no column 'question'; its columns are problem, answer"
    # Every rank finds it; torchrun may end rank 0 because another one was faster.
    assert [line.removeprefix("rank 1: ") for line in done.stderr.splitlines()] == [message]
