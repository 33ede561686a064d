"""A run's own files, corrupt or edited: skipped with a warning, or refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import xxhash

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.policy.checkpoint.checkpoints import CheckpointError, architecture_signature, wrong_common
from megatron_g2rl.records import Prompt, Response, ResponseGroup
from megatron_g2rl.rollout.engine import RolloutRequest, Sampling
from megatron_g2rl.rollout.journal import JournaledRollout
from megatron_g2rl.tracking.writers import StepLines
from megatron_g2rl.training.checkpoint_state import check_state
from megatron_g2rl.training.setup import refuse_foreign

BAD_LINES = [b"\xff", b"5", b"[]", b'{"step": null}', b'{"step": "1"}', b"{", b"", b"[" * 100_000, b'{"a": 1}', b"\x00"]


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_broken_line_of_a_metrics_file_is_skipped(tmp_path, bad, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0, "x": 1.5}\n' + bad + b'\n{"step": 1, "x": 2}\n{"step": 2}\n')
    lines = StepLines(path, 2)
    lines.write(2, {"x": 3.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert "metrics.jsonl:2: removed a corrupt line" in caplog.text


STATE = {
    "step": 3,
    "prompts": {"position": 12},
    "bad_updates": 0,
    "config": {
        "trainer": {"prompts_per_step": 4, "max_nonfinite_updates": 3},
        "algorithm": {"dynamic_sampling_rounds": 0},
    },
}


WITH_CRITIC = dict(config=STATE["config"] | {"algorithm": {"dynamic_sampling_rounds": 0, "baseline": "critic"}})


def checkpoint(folder: Path, **changes) -> Path:
    path = folder / "step_00000003"
    path.mkdir()
    (path / "trainer.json").write_text(json.dumps({"trainer": STATE | changes}))
    return path


def test_the_state_of_a_checkpoint_is_restored_unchanged(tmp_path):
    check_state(checkpoint(tmp_path))


def test_the_state_with_a_critic_is_restored_unchanged(tmp_path):
    check_state(checkpoint(tmp_path, **WITH_CRITIC, critic_bad_updates=1))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(step=-1), "step is -1, not 3"),
        (dict(step=10**9), "step is 1000000000"),
        (dict(step="3"), "step is '3'"),
        (dict(step=3.0), "step is 3.0"),
        (dict(step=True), "step is True"),
        (dict(prompts={"position": 10**9}), "prompts.position is 1000000000"),
        (dict(prompts={"position": "x"}), "prompts.position is 'x'"),
        (dict(prompts={"position": -4}), "prompts.position is -4"),
        (dict(prompts={}), "its state is incomplete"),
        (dict(prompts=None), "its state is incomplete"),
        (dict(bad_updates=-1), "bad_updates is -1"),
        (dict(bad_updates=99), "bad_updates is 99"),
        (WITH_CRITIC, "its state is incomplete (KeyError('critic_bad_updates')"),
        (WITH_CRITIC | dict(critic_bad_updates=4), "critic_bad_updates is 4"),
        (dict(config=None), "its state is incomplete"),
    ],
)
def test_an_edited_state_is_refused_by_name(tmp_path, changes, named):
    with pytest.raises(CheckpointError, match="remove it") as error:
        check_state(checkpoint(tmp_path, **changes))
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("common", "named"),
    [
        (1, "it contains 1"),
        ({"optimizer": 5, "schedule": {"num_steps": 1}}, "optimizer is 5"),
        ({"optimizer": {"step": -1}, "schedule": {"num_steps": 1}}, "step is -1"),
        ({"optimizer": {"step": 1}, "schedule": {"num_steps": "x"}}, "num_steps is 'x'"),
        ({"optimizer": {"step": 1}, "schedule": {"max_lr": 1}}, "num_steps is None"),
        ({"optimizer": {"step": 1, "digests": [1]}, "schedule": {"num_steps": 1}}, "digests is"),
        ({"optimizer": {"step": 1, "digests": {"a": 1}}, "schedule": {"num_steps": 1}}, ""),
        ({"schedule": {"num_steps": 1}}, ""),
        ({}, ""),
    ],
)
def test_the_state_common_to_all_ranks_has_the_types_that_a_run_writes(common, named):
    problem = wrong_common(common)
    assert problem.startswith(named) and bool(problem) == bool(named)


class Engine:
    """Draws the same response to every prompt."""

    def __init__(self):
        self.asked = []

    def generate(self, request):
        groups = []
        for prompt in request.prompts:
            if prompt.id in request.finished:
                groups.append(ResponseGroup(prompt, request.finished[prompt.id]))
                continue
            self.asked.append(prompt.id)
            groups.append(ResponseGroup(prompt, (Response((5, 6), (-0.5, -1.0), "five", "stop", 9),) * 2))
            request.on_group(groups[-1])
        return groups


PROMPTS = [Prompt(i, f"p{i}", (1, 2), "a") for i in range(2)]


def resealed(line: bytes, change) -> bytes:
    record = json.loads(line)
    record.pop("xxh3")
    change(record)
    body = json.dumps(record)[:-1].encode()
    return body + b', "xxh3": "' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}\n'


def set_first(**fields):
    return lambda record: record["responses"][0].update(fields)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.update(responses=[]),
        lambda record: record.update(responses=None),
        lambda record: record.update(responses=record["responses"][:1]),
        lambda record: record.update(responses=5),
        lambda record: record.update(responses=[], first=0),
        lambda record: record.update(first=1),
        lambda record: record.update(first=-1, responses=record["responses"][:1]),
        lambda record: record.update(first=True, responses=record["responses"][:1]),
        set_first(token_ids=[-5, 6]),
        set_first(token_ids=[5, 2**31]),
        set_first(token_ids=["5", 6]),
        set_first(logprobs=[-0.5]),
        set_first(logprobs=[-0.5, None]),
        set_first(logprobs=[-0.5, float("nan")]),
        set_first(text=5),
        set_first(seed="x"),
        set_first(finish_reason="abort"),
        set_first(unknown=1),
    ],
)
def test_a_journal_line_with_a_valid_seal_and_invalid_contents_is_drawn_again(tmp_path, change, caplog):
    sampling = Sampling(2, 1.0, 8, 0, 0)
    expected = JournaledRollout(Engine(), tmp_path, "f").generate(RolloutRequest(PROMPTS, sampling))
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(resealed(lines[0], change) + lines[1])
    again = Engine()
    assert JournaledRollout(again, tmp_path, "f").generate(RolloutRequest(PROMPTS, sampling)) == expected
    assert again.asked == [0] and f"{file}:1 is not a response group" in caplog.text


def test_a_key_that_is_not_a_string_is_ignored(tmp_path):
    sampling = Sampling(2, 1.0, 8, 0, 0)
    JournaledRollout(Engine(), tmp_path, "f").generate(RolloutRequest(PROMPTS, sampling))
    (file,) = tmp_path.glob("*.jsonl")
    body = b'{"key": "' + b"\xff" * 32 + b'", "prompt": 0'
    file.write_bytes(body + b', "xxh3": "' + xxhash.xxh3_64_hexdigest(body).encode() + b'"}\n' + file.read_bytes())
    again = Engine()
    JournaledRollout(again, tmp_path, "f").generate(RolloutRequest(PROMPTS, sampling))
    assert again.asked == [] and os.path.getsize(file) > 0


def test_a_token_id_that_the_model_does_not_have_is_drawn_again(tmp_path, caplog):
    sampling = Sampling(2, 1.0, 8, 0, 0)
    JournaledRollout(Engine(), tmp_path, "f").generate(RolloutRequest(PROMPTS, sampling))
    again = Engine()
    JournaledRollout(again, tmp_path, "f", vocab_size=6).generate(RolloutRequest(PROMPTS, sampling))
    assert again.asked == [0, 1] and "it has an invalid token id" in caplog.text


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("metrics.jsonl", make_folder),
        ("status.json", make_folder),
        ("metrics.jsonl", os.mkfifo),
        ("config.yaml", os.mkfifo),
        ("checkpoints/best.json", os.mkfifo),
        ("rollouts/step_00000001.rank_00000.jsonl", os.mkfifo),
        ("checkpoints", Path.touch),
        ("tensorboard", Path.touch),
        ("model", Path.touch),
    ],
)
def test_a_path_of_the_run_that_is_not_a_regular_file_is_reported(tmp_path, name, make):
    run = tmp_path / "run"
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    make(run / name)
    with pytest.raises(ConfigError, match=f"{name} is not the file or folder that a run expects"):
        refuse_foreign(run)


def test_an_intact_folder_of_a_run_is_reused(tmp_path):
    for name in ("metrics.jsonl", "config.yaml", "checkpoints/best.json", "rollouts/a.jsonl", "launch/jobs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "responses.jsonl").symlink_to("nowhere")
    refuse_foreign(tmp_path)


@pytest.mark.parametrize("state", [{}, {"architecture": None}, {"architecture": [1]}, []])
def test_a_checkpoint_without_its_model_configuration_is_reported(tmp_path, state):
    (tmp_path / "trainer.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"trainer\.json has .* for architecture"):
        architecture_signature(tmp_path)
