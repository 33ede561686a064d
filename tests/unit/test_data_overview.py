"""`g2rl data` shows the data of a run: counts, prompts, lengths, references, overlap."""

from __future__ import annotations

import json

import pytest
from chatml_model import make_chatml_model
from typer.testing import CliRunner

from megatron_g2rl.cli import app


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overview")
    make_chatml_model(folder / "model")
    return folder


def show(folder, rows, *overrides: str, code: int = 0, evaluation=()) -> str:
    for name, lines in (("rows", rows), ("test", evaluation)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (folder / "run.yaml").write_text(
        f"model: {{path: {folder / 'model'}}}\ndata: {{source: {folder / 'rows.jsonl'}}}\n"
    )
    keys = ["rollout.engine=transformers", "rollout.max_response_tokens=64", "data.max_prompt_tokens=150", *overrides]
    result = CliRunner().invoke(app, ["data", str(folder / "run.yaml"), *keys])
    assert result.exit_code == code, result.output
    return result.output


def row_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line.removeprefix(name).split()


def test_counts_prompts_lengths_and_stop_tokens_are_shown(folder):
    rows = [{"problem": f"[1]+{n % 6}", "answer": str(n)} for n in range(9)] + [{"problem": "1"}]
    text = show(folder, rows, "data.system_prompt=Add.")
    numbers = [row_of(text, name) for name in ("rows  ", "bad rows  ", "prompts  ", "distinct problems", "copies of")]
    assert [n[-1] for n in numbers] == ["10", "1", "9", "6", "3"]
    assert "rows.jsonl:10: column 'answer' is missing" in text
    assert text.count("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n[1]+") == 5
    assert "<|im_end|> (" in text and "chat template" in text
    assert row_of(text, "most") == row_of(text, "least") and row_of(text, "most")[1].endswith("%")


def test_the_longest_prompt_is_reported_for_an_evaluation_set_with_its_own_limit_and_template_too(folder, monkeypatch):
    monkeypatch.setattr("megatron_g2rl.data.overview.LENGTHS", 3)
    rows = [{"problem": "1+1" + "+1" * (20 if n == 4 else n % 3), "answer": str(n)} for n in range(9)]
    evaluation = [{"problem": "1", "answer": "1"}, {"problem": "1+2" * 9, "answer": "2"}] + [
        {"problem": "1+" * size + "1", "answer": "2"} for size in (40, 41, 42, 43, 44, 45, 99, 46)
    ]
    keys = [f"evaluation.source={folder / 'test.jsonl'}", "evaluation.max_prompt_tokens=60"]
    keys += ["evaluation.template=plain", "evaluation.plain_template=Q: {problem}", "data.system_prompt=Add."]
    text = show(folder, rows, *keys, evaluation=evaluation).replace("\n", " ")
    assert "rows.jsonl:5 with" in text.split("Longest:")[1][:200]
    assert f"test.jsonl:2 with {len('Q: ') + 27} tokens" in text.split("Longest:")[2][:200]
    assert f"the longest row is {folder}/test.jsonl:9 with {len('Q: ') + 199} tokens" in text


def test_references_and_overlap_are_shown(folder):
    solutions = [{"problem": f"1+{n}", "answer": f"It is {n} and so\n#### {n + 1}"} for n in range(4)]
    evaluation = [{"problem": " 1+2 ", "answer": "3"}, {"problem": "9+9", "answer": "18"}]
    asked = f"evaluation.source={folder / 'test.jsonl'}"
    text = show(folder, solutions, "evaluation.prompts=2", asked, evaluation=evaluation)
    unwrapped = text.replace("\n", " ")
    assert "data.answer_regex=gsm8k finds an answer in 4 of 4" in unwrapped and "A run would fail on them" in unwrapped
    assert row_of(text, "no response can match (limit data.max_unverifiable)") == ["100.00%"]
    assert row_of(text, "also in the training data") == ["1"] and "test.jsonl:1" in text
    text = show(folder, solutions, "data.answer_regex=gsm8k", asked, evaluation=[{"problem": "7", "answer": "{"}])
    numbers = [line.split()[-1] for line in text.splitlines() if line.startswith("no response can match")]
    assert numbers == ["0.00%", "100.00%"] and "test.jsonl:1: '{' is rejected" in text
    text = show(folder, solutions, "data.answer_regex=gsm8k")
    assert row_of(text, "no response can match (limit data.max_unverifiable)") == ["0.00%"]


def test_unusable_data_is_one_message(folder):
    text = show(folder, [{"question": "1", "answer": "1"}], code=2)
    assert "has no column 'problem'; its columns are question, answer" in text and "Traceback" not in text
