"""Files of a run: JSON lines and TensorBoard that agree after a resume, and readable responses."""

from __future__ import annotations

import json
import logging
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from megatron_g2rl.config import Config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.sections.method import AlgorithmConfig
from megatron_g2rl.records import Experience, Prompt, Response, ResponseGroup, TokenStatistics
from megatron_g2rl.tracking.metrics import experience_metrics
from megatron_g2rl.tracking.responses import response_rows, responses_page
from megatron_g2rl.tracking.table import unknown_names
from megatron_g2rl.tracking.tracker import Tracker
from megatron_g2rl.tracking.writers import StepLines

HOSTILE = 'a "quoted"\nsecond line\u2028third\x9b31m \\boxed{é} ``` <script>alert(1)</script>\ud800'


def config(**logging_keys) -> Config:
    return Config(model={"path": "m"}, data={"source": "d"}, logging=logging_keys)


def experience(rewards=(-1.0, -1.0, 1.0, 1.0, 1.0, -1.0), novelty=(0, 0, 0.1, 0.5, 0.9, 0.3), text="t") -> Experience:
    """Two responses to one prompt, both wrong, and four to another; Φ is random."""
    responses = [Response((1, 2), (-0.5, -1.0), f"{text}{i}", "stop", i) for i in range(6)]
    prompts = [Prompt(i, f"prompt {i}", (3,), f"answer {i}") for i in range(2)]
    groups = (ResponseGroup(prompts[0], tuple(responses[:2])), ResponseGroup(prompts[1], tuple(responses[2:])))
    features = None if novelty is None else torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    base = torch.tensor(rewards)
    return Experience(
        groups=groups,
        rewards=base,
        features=features,
        novelty=None if novelty is None else torch.tensor(novelty),
        shaped=base * 1.25,
        advantages=torch.zeros(6),
        kept=torch.ones(6, dtype=torch.bool),
        correct=base > 0,
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def events(folder: Path) -> dict[str, list[tuple[int, object]]]:
    """(step, value) pairs of every tag, as TensorBoard's own server reads them."""
    found = EventAccumulator(str(folder), tensor_size_guidance={"scalars": 0, "text": 0})
    found.Reload()
    tags = found.Tags()["tensors"]
    return {tag: [(e.step, make_ndarray(e.tensor_proto).item()) for e in found.Tensors(tag)] for tag in tags}


def track(folder: Path, first: int, last: int, factor: float = 1.0, **keys) -> None:
    tracker = Tracker(folder, config(**keys), first)
    for step in range(first, last):
        tracker.write(step, {"reward/mean": factor * step, "update/loss": math.nan}, experience(text=f"{factor} "))
    tracker.close()


def test_a_resumed_run_removes_entries_after_its_checkpoint_everywhere(tmp_path):
    track(tmp_path, 0, 5, responses_every_steps=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rewa')  # killed while writing
    track(tmp_path, 3, 6, factor=10.0, responses_every_steps=2)
    expected = [0, 1, 2, 30, 40, 50]
    assert [line["reward/mean"] for line in lines(tmp_path / "metrics.jsonl")] == expected
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(6))
    assert [line["step"] for line in lines(tmp_path / "responses.jsonl")] == [0] * 3 + [2] * 3 + [4] * 3
    found = events(tmp_path / "tensorboard")
    assert found["reward/mean"] == list(enumerate(expected))
    texts = found["responses/text_summary"]
    assert [step for step, _ in texts] == [0, 2, 4]
    assert b"10.0 4" in texts[-1][1], "step 4 is the resumed run's"


def test_the_evaluation_of_a_checkpoints_weights_is_kept_by_the_resume_from_it(tmp_path):
    settings = Config(model={"path": "m"}, data={"source": "d"}, evaluation={})
    for first, value in ((0, 0.1), (2, 0.9)):
        tracker = Tracker(tmp_path, settings, first)
        for step in (4,) if first else (0, 2, 4):
            tracker.write_evaluation(step, {"evaluation/pass_at_1": value})
        tracker.close()
    found = events(tmp_path / "tensorboard" / "evaluation")["evaluation/pass_at_1"]
    assert found == [(0, pytest.approx(0.1)), (2, pytest.approx(0.1)), (4, pytest.approx(0.9))]


def test_a_run_that_starts_over_removes_the_files_of_the_first(tmp_path):
    track(tmp_path, 0, 3)
    track(tmp_path, 0, 1)
    assert len(lines(tmp_path / "metrics.jsonl")) == 1
    assert events(tmp_path / "tensorboard")["reward/mean"] == [(0, 0.0)]


def test_a_non_finite_number_is_null_in_the_file_and_absent_from_tensorboard(tmp_path):
    track(tmp_path, 0, 1)
    assert lines(tmp_path / "metrics.jsonl")[0]["update/loss"] is None
    assert "update/loss" not in events(tmp_path / "tensorboard")


def test_tensorboard_and_responses_can_be_disabled(tmp_path):
    track(tmp_path, 0, 2, tensorboard=False, responses_every_steps=0)
    assert [file.name for file in tmp_path.iterdir() if file.stat().st_size] == ["metrics.jsonl"]


def test_the_last_step_of_a_file_is_known_when_it_is_opened_again(tmp_path):
    assert StepLines(tmp_path / "a.jsonl", 0).last_step is None
    StepLines(tmp_path / "a.jsonl", 0).write(4, {"x": 1.0})
    assert StepLines(tmp_path / "a.jsonl", 5).last_step == 4
    assert StepLines(tmp_path / "a.jsonl", 4).last_step is None


def test_the_responses_are_the_most_and_least_novel_of_the_first_mixed_group():
    rows = response_rows(experience())
    assert [row["response"] for row in rows] == ["t4", "t2", "t5"]
    assert rows[0] == {
        "prompt": "prompt 1",
        "response": "t4",
        "answer": "answer 1",
        "reward": 1.0,
        "correct": True,
        "novelty": pytest.approx(0.9),
        "shaped": 1.25,
        "finish_reason": "stop",
    }


def test_without_a_mixed_group_or_novelty_responses_are_still_chosen():
    assert [row["response"] for row in response_rows(experience(rewards=(-1.0,) * 6))] == ["t0", "t1"]
    rows = response_rows(experience(novelty=None))
    assert [row["novelty"] for row in rows] == [None] * 3 and rows[0]["prompt"] == "prompt 1"


def test_a_hostile_response_stays_on_its_line_and_is_read_back_unchanged(tmp_path):
    StepLines(tmp_path / "responses.jsonl", 0).write(0, {"response": HOSTILE}, {"response": "plain é"})
    raw = (tmp_path / "responses.jsonl").read_text(encoding="utf-8")
    assert len(raw.splitlines()) == 2 and "\x9b" not in raw and "plain é" in raw
    assert lines(tmp_path / "responses.jsonl")[0]["response"] == HOSTILE


def test_a_hostile_response_stays_inside_its_block_of_the_page():
    row = response_rows(experience())[0] | {"response": HOSTILE}
    page = responses_page([row])
    assert [line for line in page.splitlines() if "<script>" in line or "second" in line or "```" in line]
    assert all(line.startswith("    ") for line in page.splitlines() if "script" in line or "second" in line)


def test_every_metric_of_an_experience_is_in_the_table():
    values = (torch.tensor([-0.5, -1.0]),) * 6
    penalties = {name: torch.zeros(6) for name in ("overlong", "kl")}
    algorithm = AlgorithmConfig(importance_level="sequence", rejection_bounds=(0.5, 2.0))
    for novelty in ((0.0,) * 6, None):
        one = replace(experience(novelty=novelty), penalties=penalties)
        assert not unknown_names(experience_metrics(one, TokenStatistics(values, values), algorithm))


def test_an_unknown_name_is_written_and_reported_once(tmp_path, caplog):
    tracker = Tracker(tmp_path, config(tensorboard=False), 0)
    with caplog.at_level(logging.WARNING):
        tracker.write(0, {"reward/meen": 1.0}, experience())
        tracker.write(1, {"reward/meen": 1.0}, experience())
    assert len(caplog.messages) == 1 and "reward/meen" in caplog.text and "table.py" in caplog.text
    assert lines(tmp_path / "metrics.jsonl")[1]["reward/meen"] == 1.0


def test_wandb_is_imported_only_if_enabled_and_its_absence_is_reported_with_key_and_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import wandb fails
    track(tmp_path, 0, 1, tensorboard=False)
    with pytest.raises(ConfigError, match=r"logging\.wandb_project=p.*pip install wandb"):
        Tracker(tmp_path, config(tensorboard=False, wandb_project="p"), 0)


def test_a_resumed_run_continues_under_its_wandb_id(tmp_path, monkeypatch):
    calls, logged = [], []
    run = types.SimpleNamespace(define_metric=lambda *a, **k: None, log=logged.append, finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    track(tmp_path, 0, 2, tensorboard=False, wandb_project="p")
    track(tmp_path, 1, 2, tensorboard=False, wandb_project="p")
    assert calls[0] == calls[1] and calls[0]["project"] == "p" and calls[0]["resume"] == "allow"
    assert [line["step"] for line in logged] == [0, 1, 1] and "update/loss" not in logged[0]
