"""Rows in the format of public datasets train unchanged, and responses of a base model end at the end of the turn."""

from __future__ import annotations

import json
from pathlib import Path

import hub_rows
import pytest
import yaml
from chatml_model import TURN_END, make_chatml_model

from megatron_g2rl.rollout.tokenizer import load_tokenizer
from tools.fuzz.forking import ForkedCommand

pytestmark = pytest.mark.same_for_both

EXAMPLE = Path(__file__).parents[2] / "examples" / "qwen3_4b_math" / "g2rl.yaml"
SMALL = {
    "rollout.engine": "transformers",
    "rollout.max_response_tokens": 6,
    "reward.workers": 1,
    "algorithm.drop_uniform_groups": False,
    "algorithm.kl_coefficient": 0,
    "policy.device": "cpu",
    "policy.precision": "fp32",
    "policy.recompute": "none",
    "policy.tensor_parallel": 1,
    "policy.sequence_parallel": False,
    "data.system_prompt": "",
    "data.max_prompt_tokens": 200,
    "trainer.ranks": 1,
    "trainer.steps": 2,
    "trainer.prompts_per_step": 2,
    "trainer.group_size": 2,
    "trainer.responses_per_update": 4,
    "trainer.tokens_per_microbatch": 512,
    "logging.tensorboard": False,
    "logging.responses_every_steps": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_chatml_model(tmp_path_factory.mktemp("chatml") / "model", eagerness=4.0)


def train(
    folder: Path, model: Path, environment: dict[str, str], code: int = 0, **settings: object
) -> tuple[Path, str]:
    """Train with the example's keys where none is given; returns the run's folder and output."""
    keys = {**SMALL, "model.path": str(model), "run.directory": str(folder), "run.name": "run", **settings}
    tree: dict[str, dict] = {}
    for key, value in keys.items():
        section, _, leaf = key.partition(".")
        if leaf:
            tree.setdefault(section, {})[leaf] = value
        else:
            tree[section] = value
    (folder / "run.yaml").write_text(yaml.safe_dump({"base": str(EXAMPLE), **tree}))
    command = ForkedCommand(["train", "run.yaml"], folder=folder, output=folder / "output", environment=environment)
    assert command.wait(120) == code, command.read()[-4000:]
    return folder / "run", command.read()


@pytest.mark.parametrize("shape", hub_rows.SHAPES)
def test_rows_in_the_format_of_a_public_dataset_train(tmp_path, model, environment, shape):
    keys = {f"data.{key}": value for key, value in hub_rows.write(shape, tmp_path / "rows").items()}
    keys = {"data.answer_column": "answer", **keys}
    run, text = train(tmp_path, model, environment, **keys)
    assert "0 of 4 are not final answers" in text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2


def test_every_response_of_a_base_model_ends_with_its_turn(tmp_path, model, environment):
    keys = {f"data.{key}": value for key, value in hub_rows.write("math", tmp_path / "rows").items()}
    run, text = train(tmp_path, model, environment, **keys, **{"rollout.max_response_tokens": 256})
    tokenizer = load_tokenizer(str(model))
    assert f"a response ends at <|endoftext|> ({tokenizer.convert_tokens_to_ids('<|endoftext|>')}" in text
    assert f"{TURN_END} ({tokenizer.convert_tokens_to_ids(TURN_END)}: chat template" in text
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["response/truncated_fraction"] == 0 for line in metrics)


def test_a_resumed_run_with_several_sources_draws_the_prompts_of_an_uninterrupted_one(tmp_path, model, environment):
    rows = {name: hub_rows.write(name, tmp_path / name) for name in ("dapo", "gsm8k")}
    sources = [
        {"answer_column": "answer", **{key: str(value) for key, value in keys.items()}, "weight": weight}
        for keys, weight in zip(rows.values(), (1, 1), strict=True)
    ]
    asked = {}
    for name, parts in (("straight", [3]), ("resumed", [1, 3])):
        (tmp_path / name).mkdir()
        for steps in parts:
            keys = {"data.source": None, "data.sources": sources, "trainer.steps": steps, "checkpoint.every_steps": 1}
            run, _ = train(tmp_path / name, model, environment, **keys)
        asked[name] = (run / "responses.jsonl").read_text()
    assert "Solve:" in asked["straight"] and "1000?" in asked["straight"]
    assert asked["resumed"] == asked["straight"]


def test_references_of_an_evaluation_set_are_verified_before_the_run(tmp_path, model, environment):
    keys = {f"data.{key}": value for key, value in hub_rows.write("math", tmp_path / "rows").items()}
    (tmp_path / "evaluation_set.jsonl").write_text('{"problem": "1+1", "answer": "\\\\frac{1}{"}\n')
    evaluation_set = {"source": str(tmp_path / "evaluation_set.jsonl"), "answer_column": "answer", "prompts": 1}
    text = train(tmp_path, model, environment, **keys, evaluation=evaluation_set, code=1)[1]
    assert "evaluation set (keys of `evaluation` override those of `data`)" in text
    assert "evaluation_set.jsonl:1: '\\\\frac{1}{' is rejected" in text
