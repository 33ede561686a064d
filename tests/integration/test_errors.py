"""Incorrect uses of `g2rl train`: each ends within seconds with one message that names the key or file and the remedy.

Every case is a real run of the command, in a process forked from one that has everything imported (0.3 s, not 7 s).
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from training_runs import rank_environments

from tools.fuzz.forking import ForkedCommand, Outcome, preload, run_forked

SECONDS = 60.0
"""Limit in seconds for the message, which usually takes three; no case reaches a training step."""

CONFIG = """
run: {name: run, directory: runs}
model: {path: model}
data: {source: problems.jsonl, max_prompt_tokens: 64, system_prompt: ""}
# an untrained model ends no response by itself
rollout: {engine: transformers, max_response_tokens: 8, incomplete_responses: scored}
reward: {workers: 1}
algorithm: {drop_uniform_groups: false, kl_coefficient: 0}
policy: {device: cpu, precision: fp32}
trainer: {steps: 1, prompts_per_step: 2, group_size: 2, responses_per_update: 4, tokens_per_microbatch: 256}
"""


@dataclass
class Place:
    """A working folder with a configuration, a model and problems that train without an error."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    before: Callable[[], object] | None = None
    """Called in the process of the command, before the command."""
    closing: ExitStack = field(default_factory=ExitStack)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def change_model(self, **settings: object) -> None:
        file = self.folder / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from megatron_g2rl.data.tiny_model import make_random_model

    return make_random_model(tmp_path_factory.mktemp("tiny") / "model", "qwen3")


@pytest.fixture
def place(tmp_path, model):
    shutil.copytree(model, tmp_path / "model")
    made = Place(tmp_path)
    made.write("config.yaml", CONFIG)
    rows = [{"problem": f"1+{i}=?", "answer": str(1 + i)} for i in range(8)]
    made.write("problems.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with made.closing:
        yield made


def train(place: Place, *overrides: str, config: str = "config.yaml") -> Outcome:
    """Run `g2rl train` in a forked process."""
    preload()
    outcome = run_forked(
        ["train", config, *overrides],
        place.folder,
        place.folder.parent / f"{place.folder.name}.out",
        limit_s=SECONDS,
        environment=place.environment,
        before=place.before,
    )
    if outcome.stopped:
        pytest.fail(f"no message after {SECONDS} s:\n{outcome.text[-4000:]}")
    return outcome


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


def built_in_model(place: Place) -> None:
    place.write("built_in.yaml", "base: config.yaml\nwarm_start: {steps: 300}\n")
    place.environment["XDG_CACHE_HOME"] = str(place.folder / "cache")


BUILT_IN = ("model.path=builtin:tiny", "data.source=builtin:arithmetic")
SCORE = "reward.function=mine:score"

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
    Case("no_such_task_of_the_built_in_model", ("chess", "arithmetic"), (BUILT_IN[0], "data.source=builtin:chess")),
    Case(
        "an_error_is_reported_before_the_warm_start",
        ("data.max_prompt_tokens=3",),
        (*BUILT_IN, "data.max_prompt_tokens=3"),
        built_in_model,
        "built_in.yaml",
    ),
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
    _is_one_message(outcome, case.code, case.expected)
    assert not list(place.folder.rglob("checkpoints/step_*")), "it came after a checkpoint"


def _is_one_message(outcome: Outcome, code: int, expected: tuple[str, ...]) -> None:
    assert outcome.code == code, outcome.text
    assert "Traceback" not in outcome.text
    for words in expected:
        assert words in outcome.text


def _truncate_and_reseal(checkpoint: Path, name: str, size: int) -> None:
    os.truncate(max(checkpoint.rglob(name), key=lambda file: file.stat().st_size), size)


def test_an_existing_run_is_reported_and_a_corrupt_checkpoint_named(place):
    assert (fine := train(place)).code == 0, fine.text
    checkpoint = place.folder / "runs" / "run" / "checkpoints" / "step_00000001"
    _is_one_message(train(place, "checkpoint.resume=false"), 2, ("step_00000001", "run.name", "checkpoint.resume"))
    for name, size in [("*.distcp", 1000), (".metadata", 50), ("trainer.json", 5)]:
        _truncate_and_reseal(checkpoint, name, size)
        expected = (checkpoint.name, "is corrupt", "remove this folder")
        _is_one_message(train(place, "trainer.steps=2"), 1, expected)


def test_inputs_changed_since_the_run_started_are_named_before_it_resumes(place):
    place.write("mine.py", "def score(t, a): return 1.0\n")
    assert (first := train(place, SCORE)).code == 0, first.text
    rows, config = (place.folder / "problems.jsonl").read_text(), (place.folder / "model" / "config.json").read_text()
    changes = {
        "data.source": lambda: place.write("problems.jsonl", rows + '{"problem": "9+9=?", "answer": "18"}\n'),
        "model.path": lambda: place.change_model(transformers_version="0"),
        "reward.function": lambda: place.write("mine.py", "def score(t, a): return 0.5\n"),
    }
    for key, change in changes.items():
        change()
        expected = (key, "have changed since", f"checkpoint.allow_changed={key}")
        _is_one_message(train(place, SCORE, "trainer.steps=2"), 2, expected)
        place.write("problems.jsonl", rows)
        place.write("model/config.json", config)
        place.write("mine.py", "def score(t, a): return 1.0\n")
    changes["data.source"]()
    allowed = train(place, SCORE, "trainer.steps=2", "checkpoint.allow_changed=data.source")
    assert allowed.code == 0, allowed.text


@pytest.mark.same_for_both
def test_after_a_killed_rank_the_error_names_the_checkpoint_to_resume_from(place):
    place.write(
        "mine.py",
        # in a step, not when the function is smoke-tested on an empty and a correct-looking response
        "import os\ndef score(t, a):\n"
        "  if os.environ['RANK'] == '1' and t and 'boxed' not in t: os.kill(os.getppid(), 9)\n  return 1.0\n",
    )
    command = [sys.executable, "-m", "megatron_g2rl.cli", "train", "config.yaml", "trainer.ranks=2", SCORE]
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "another rank is lost" in done.stderr
    assert "the cause. There is no checkpoint yet: the same command starts" in done.stderr
    assert train(place, SCORE).code == 0
    # Ranks of another launcher.
    ranks = [
        ForkedCommand(["train", "config.yaml", SCORE, "trainer.steps=2"], place.folder, file, environment=environment)
        for file, environment in zip(
            (place.folder / "rank_0.out", place.folder / "rank_1.out"),
            rank_environments(2, dict(os.environ) | place.environment),
            strict=True,
        )
    ]
    assert [rank.wait(SECONDS) for rank in ranks] == [1, -signal.SIGKILL]
    text = ranks[0].read()
    assert "Traceback" not in text, text
    assert "The same command resumes from step 1, the latest checkpoint (runs/run/ch" in text


@pytest.mark.same_for_both
def test_an_unreachable_hub_is_reported_once_by_two_ranks(place):
    command = [sys.executable, "-m", "megatron_g2rl.cli", "train", "config.yaml", "trainer.ranks=2"]
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    command += ["model.path=nobody/nothing"]
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 1
    (message,) = done.stderr.splitlines()
    assert message.startswith("command line: model.path=nobody/nothing is not a folder (relative paths start at")
    assert "the Hugging Face Hub cannot be reached ([Errno 111] Connection refused). Pass a local folder" in message


@pytest.mark.same_for_both
def test_an_error_on_all_ranks_is_reported_once(place):
    command = [sys.executable, "-m", "megatron_g2rl.cli", "train", "config.yaml", "trainer.ranks=2"]
    command += ["data.prompt_column=question"]
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    message = "data.prompt_column: problems.jsonl has no column 'question'; its columns are problem, answer"
    assert done.stderr.splitlines() == [message]


# ---------------------------------------------------------------------- the folder of the run, while it is written to
# In a step, not when the function is smoke-tested on an empty and a correct response.
ONCE = (
    "import os, pathlib, shutil\ndef score(t, a):\n  if t and 'boxed' not in t: once()\n  return 1.0\ndef once():\n  "
)
REMOVE = "shutil.rmtree('runs/run', ignore_errors=True)\n"
MOVE = "os.path.exists('runs/run') and os.rename('runs/run', 'runs/other')\n"
REPLACE = f"{MOVE}  pathlib.Path('runs/run').mkdir(exist_ok=True), pathlib.Path('runs/run/run.lock').touch()\n"
EVERY = ("trainer.steps=3", "checkpoint.every_steps=1", "checkpoint.export_hf_every=1", SCORE)


@pytest.mark.parametrize(
    ("how", "left"), [(REMOVE, []), (MOVE, []), (REPLACE, ["run.lock"])], ids=["rm", "mv", "other"]
)
def test_a_run_whose_folder_is_removed_ends_at_the_next_write_and_does_not_recreate_it(how, left, place):
    place.write("mine.py", ONCE + how)
    outcome = train(place, *EVERY)
    _is_one_message(outcome, 1, ("runs/run is no longer the folder of this run", "put the folder back"))
    run = place.folder / "runs" / "run"
    assert [path.name for path in run.glob("*")] == left and run.exists() == bool(left)


@pytest.mark.same_for_both
def test_two_ranks_whose_folder_is_removed_report_it_once(place):
    place.write("mine.py", ONCE + REMOVE)
    command = [sys.executable, "-m", "megatron_g2rl.cli", "train", "config.yaml", "trainer.ranks=2", *EVERY]
    done = subprocess.run(command, cwd=place.folder, capture_output=True, text=True, timeout=120)
    messages = [line for line in done.stderr.splitlines() if "is no longer the folder of this run" in line]
    assert len(messages) == 1 and messages[0].startswith("runs/run is"), done.stderr
    assert done.returncode == 1 and "Traceback" not in done.stderr and "rank 1" not in done.stderr
    assert not (place.folder / "runs" / "run").exists()


@pytest.mark.parametrize(
    ("room", "where"),
    [(0, "runs/run:"), (1_000_000, "runs/run:"), (8_000_000, "the checkpoint of step 2")],
    ids=["metrics", "export", "checkpoint"],
)
def test_a_disk_that_fills_up_ends_the_run_with_one_message_and_keeps_the_files_written(room, where, place):
    place.write("mine.py", "def score(t, a): return 1.0\n")
    assert (first := train(place, *EVERY[1:])).code == 0, first.text
    run, disk = place.folder / "runs" / "run", place.folder / "disk"
    shutil.copytree(place.folder / "runs", disk)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "small", str(place.folder / "runs")])
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    place.closing.callback(subprocess.run, ["umount", "--lazy", str(place.folder / "runs")], check=True)
    shutil.copytree(disk, place.folder / "runs", dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    fill = "free = os.statvfs('runs')\n  if not os.path.exists('runs/ballast'):\n    "
    fill += f"pathlib.Path('runs/ballast').write_bytes(bytes(free.f_bavail * free.f_frsize - {room}))\n"
    place.write("mine.py", ONCE + fill)
    settings = ("checkpoint.allow_changed=reward.function", "checkpoint.asynchronous=false")
    outcome = train(place, *EVERY, *settings)
    _is_one_message(outcome, 1, (where, "No space left on device", "disk space", "resumes from step 1"))
    rewritten = ("metrics.jsonl", "responses.jsonl", "config.yaml", "status.json", "run.lock")
    for path, content in before.items():
        assert path.read_bytes().startswith(content) or path.name in rewritten, path
    (place.folder / "runs" / "ballast").unlink()
    place.write("mine.py", "def score(t, a): return 1.0\n")
    assert (resumed := train(place, *EVERY)).code == 0, resumed.text
