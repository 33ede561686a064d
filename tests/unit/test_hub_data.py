"""Rows in Hub formats load unchanged; hostile ones are one message with file and line."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import datasets
import hub_rows
import numpy as np
import pytest

from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.data import json_rows, store
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.data.prompts import PromptStream, check_embedding, load_prompts
from megatron_g2rl.data.tiny_model import make_tokenizer
from megatron_g2rl.training.contents import rows_digest

pytestmark = pytest.mark.same_for_both


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(file: Path, *rows: object) -> DataConfig:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    return DataConfig(source=str(file), system_prompt="")


@pytest.mark.parametrize("shape", hub_rows.SHAPES)
def test_rows_in_the_format_of_a_public_dataset_load(tmp_path, tokenizer, shape):
    config = hub_rows.config(shape, tmp_path / shape, system_prompt="")
    prompts = load_prompts(config, tokenizer)
    _, problem, answer = hub_rows.SHAPES[shape]
    assert len(prompts) == hub_rows.COUNT and prompts.report.bad.count == 0
    assert prompts[2].text.endswith(f"<user>{problem}<end><assistant>") and prompts[2].answer == answer
    assert prompts[2].source.endswith(".parquet:3")


def test_a_message_list_keeps_its_system_message_or_gets_the_configured_one(tmp_path, tokenizer):
    own = load_prompts(hub_rows.config("trl", tmp_path / "trl", system_prompt="Ours."), tokenizer)
    assert own[0].text == "<system>Be brief.<end><user>0+1=?<end><assistant>"
    ours = load_prompts(hub_rows.config("dapo", tmp_path / "dapo", system_prompt="Ours."), tokenizer)
    assert ours[0].text.startswith("<system>Ours.<end><user>Solve")
    plain = hub_rows.config("trl", tmp_path / "plain", template="plain", plain_template="{system} {problem}\n")
    assert load_prompts(plain, tokenizer)[0].text == "Be brief. 0+1=?\n"


def test_a_folder_in_hub_layout_is_read_by_configuration_and_split(tmp_path, tokenizer):
    config = hub_rows.config("gsm8k", tmp_path, system_prompt="")
    other = config.model_copy(update=dict(subset="socratic", split="test"))
    assert "socratic test 0+1000?" in load_prompts(other, tokenizer)[0].text
    with pytest.raises(DataError, match="data.subset=None.*main.*socratic"):
        load_prompts(config.model_copy(update=dict(subset=None)), tokenizer)
    with pytest.raises(DataError, match="data.split.*no split 'dev'.*train, test"):
        load_prompts(config.model_copy(update=dict(split="dev")), tokenizer)
    (tmp_path / "README.md").unlink()
    assert "socratic test" in load_prompts(other, tokenizer)[0].text  # then the subfolder is the configuration


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.arrow"])
def test_compressed_and_arrow_files_load(tmp_path, tokenizer, name):
    rows = [{"problem": f"1+{n}", "answer": str(n + 1)} for n in range(3)]
    if name == "a.arrow":
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        (file,) = (tmp_path / "saved").glob("*.arrow")
    else:
        text = json.dumps(rows) if name == "a.json.gz" else "".join(json.dumps(row) + "\n" for row in rows)
        file = tmp_path / name
        file.write_bytes(gzip.compress(text.encode()))
    found = load_prompts(DataConfig(source=str(file)), tokenizer)
    assert [prompt.answer for prompt in found] == ["1", "2", "3"]


def test_a_truncated_gzip_is_one_message(tmp_path, tokenizer):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"problem": "1", "answer": "1"}\n' * 99)[:-9])
    with pytest.raises(DataError, match=r"a.jsonl.gz cannot be read"):
        load_prompts(DataConfig(source=str(tmp_path / "a.jsonl.gz")), tokenizer)


HOSTILE = {
    "surrogate": (r'{"problem": "\ud800", "answer": "1"}', r"holds '\\ud800', an unpaired surrogate"),
    "surrogate_answer": (r'{"problem": "1", "answer": "\udfff"}', "an unpaired surrogate"),
    "nan": ('{"problem": "1", "answer": NaN}', "holds NaN, which is not a number"),
    "infinity": ('{"problem": "1", "answer": -Infinity}', "holds -Infinity, which is not a number"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep_value": ('{"problem": "1", "answer": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "digits_as_row": ("9" * 5_000, "not a JSON object but a number"),
    "digits_as_problem": ('{"problem": ' + "9" * 5_000 + ', "answer": "1"}', "holds int, not text"),
    "assistant_last": ('{"problem": [{"role": "assistant", "content": "x"}], "answer": "1"}', "not of the user"),
    "no_message": ('{"problem": ["x"], "answer": "1"}', "'problem.0' is not a chat message"),
    "odd_role": ('{"problem": [{"role": "r\\ud800", "content": "x"}], "answer": "1"}', "expected one of system, user"),
    "no_messages": ('{"problem": [], "answer": "1"}', "'problem' is empty"),
    "empty_answers": ('{"problem": "1", "answer": [[], []]}', "'answer' is empty"),
    "odd_column": ('{"\\ud800": 1}', "'problem' is missing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_row_is_one_message_with_its_line_or_is_skipped(tmp_path, tokenizer, caplog, name):
    line, fault = HOSTILE[name]
    good = {"problem": "1", "answer": "1"}
    config = write(tmp_path / "a.jsonl", good, line, good)
    with pytest.raises(DataError) as error:
        load_prompts(config, tokenizer)
    message = str(error.value).encode().decode()  # can be printed
    assert "a.jsonl:2: " in message and fault.replace("\\\\", "\\") in message and len(message) < 1000
    found = load_prompts(config.model_copy(update={"on_bad_row": "skip"}), tokenizer)
    assert [prompt.id for prompt in found] == [0, 2] and found.report.bad.count == 1


def test_invalid_utf8_and_deep_nesting_in_an_array_are_one_message(tmp_path, tokenizer):
    file = tmp_path / "a.json"
    for content, expected_message in [
        (b'[\n{"a": "\xff"}\n]', r"a.json:2: not UTF-8"),
        (b"[" * 100_000, "a.json: nested too deep"),
    ]:
        file.write_bytes(content)
        with pytest.raises(DataError, match=expected_message):
            load_prompts(DataConfig(source=str(file)), tokenizer)


def test_an_endless_line_is_not_read_into_memory(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(json_rows, "LONGEST_LINE", 2**20)
    good = {"problem": "1", "answer": "1"}
    config = write(tmp_path / "a.jsonl", good, '{"problem": "' + "x" * 2**22, good)
    with pytest.raises(DataError, match=r"1 of 3 rows(.|\n)*a.jsonl:2: unreadable: longer than 1 MiB"):
        load_prompts(config, tokenizer)


@pytest.mark.parametrize("written", ["1e16", "1E+2", "0.10", "-0", "1e999", "12345678901234567890", "9" * 5_000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_numbers_keep_their_written_form(tmp_path, tokenizer, written, name):
    row = f'{{"problem": "1", "answer": {written}}}'
    config = write(tmp_path / name, row if name == "a.jsonl" else f"[{row}]")
    assert load_prompts(config, tokenizer)[0].answer == written


def test_numbers_of_a_table_become_text_and_nan_is_refused(tmp_path, tokenizer):
    values = [72.0, 0.5, 1e16, math.nan]
    rows = {"problem": ["1"] * 4, "answer": np.array(values)}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "a.parquet"))
    found = load_prompts(DataConfig(source=str(tmp_path / "a.parquet"), on_bad_row="skip"), tokenizer)
    assert [prompt.answer for prompt in found] == ["72", "0.5", "1e+16"] and found.report.bad.count == 1


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        ("gsm8k", "4 #### no\n#### -1,234 ", "-1234"),
        ("boxed", r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("last_number", "from 3 to 1,250.50.", "1250.50"),
        (r"Answer: (\S+)", "Answer: 3\nAnswer: 4", "4"),
        (r"\d+$", "it is 12", "12"),
    ],
)
def test_the_answer_is_extracted_from_its_column(tmp_path, tokenizer, pattern, text, answer):
    rows = [{"problem": "1", "answer": text}, {"problem": "1", "answer": "nothing"}]
    config = write(tmp_path / "a.jsonl", *rows).model_copy(update={"answer_regex": pattern, "on_bad_row": "skip"})
    found = load_prompts(config, tokenizer)
    assert [prompt.answer for prompt in found] == [answer]
    assert "finds no answer in column 'answer': 'nothing'" in found.report.bad.shown[0]


def test_nested_columns_and_lists_of_answers_load(tmp_path, tokenizer):
    row = {"a": {"b": [{"q": "1+1"}], "x.y": 1}, "final": [["1", 2], ["x=3"]]}
    config = write(tmp_path / "a.jsonl", row)
    nested = config.model_copy(update=dict(prompt_column="a.b.0.q", answer_column="final"))
    assert load_prompts(nested, tokenizer)[0].answer == "1, 2, x=3"
    with pytest.raises(DataError, match="data.answer_column: .*no column 'a.z'; its columns are a.b, a.x.y, final"):
        load_prompts(nested.model_copy(update=dict(answer_column="a.z")), tokenizer)


def test_the_longest_row_is_reported(tmp_path, tokenizer):
    rows = [{"problem": "1" * (50 + n), "answer": "1"} for n in [*range(6), 300, 7]]
    config = write(tmp_path / "a.jsonl", *rows).model_copy(update={"max_prompt_tokens": 40})
    with pytest.raises(DataError, match=r"and 3 more\n  the longest row is .*a.jsonl:7 with 353 tokens"):
        load_prompts(config, tokenizer)


def test_copies_are_counted(tmp_path, tokenizer, caplog):
    config = write(tmp_path / "a.jsonl", *[{"problem": f"1+{n % 3}", "answer": "1"} for n in range(30)])
    assert load_prompts(config, tokenizer).report.distinct == 3
    assert "27 of 30 problems" in caplog.text and "3 are distinct" in caplog.text


def test_rows_on_disk_equal_those_in_memory(tmp_path, tokenizer, monkeypatch):
    config = write(tmp_path / "a.jsonl", *[{"problem": f"1+{n}", "answer": n} for n in range(60)])
    in_memory = load_prompts(config, tokenizer)
    monkeypatch.setattr(store, "ROWS_IN_MEMORY", 7)
    monkeypatch.setattr(store, "ROWS_AT_ONCE", 5)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    on_disk = load_prompts(config, tokenizer)
    assert list(on_disk) == list(in_memory) and on_disk[-1] == in_memory[59]
    assert rows_digest(on_disk) == rows_digest(in_memory)
    assert on_disk.rows.cache_files and not list((tmp_path / "cache").iterdir())  # mapped; nothing is left behind


def test_several_sources_keep_their_columns_and_weights(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl", *[{"problem": f"a{n}", "answer": "1"} for n in range(10)])
    write(tmp_path / "b.jsonl", *[{"q": f"b{n}", "r": "#### 2"} for n in range(20)])
    second = dict(source=str(tmp_path / "b.jsonl"), prompt_column="q", answer_column="r", answer_regex="gsm8k")
    parts = [dict(source=str(tmp_path / "a.jsonl")), second]
    both = load_prompts(DataConfig(sources=parts, system_prompt=""), tokenizer)
    assert len(both) == 30 and both.parts is None and both[12].answer == "2" and both[12].id == 12
    assert len({prompt.id for prompt in PromptStream(both, 0).next(30)}) == 30
    weighted = DataConfig(sources=[p | {"weight": w} for p, w in zip(parts, (3, 1), strict=True)], system_prompt="")
    dataset = load_prompts(weighted, tokenizer)
    stream = PromptStream(dataset, 0, parts=dataset.parts)
    drawn = [prompt for _ in range(500) for prompt in stream.next(2)]
    assert sum(prompt.id < 10 for prompt in drawn) == pytest.approx(750, abs=5)
    counts = np.bincount([prompt.id for prompt in drawn], minlength=30)
    assert counts[:10].min() >= 73 and counts[10:].min() >= 11  # each source has its own epochs


def test_a_resumed_stream_of_several_sources_draws_the_same(tmp_path, tokenizer):
    dataset = [hub_rows.COUNT + n for n in range(30)]

    class Rows(list):
        def __getitem__(self, place):
            from megatron_g2rl.records import Prompt

            return Prompt(place, str(place), (1,), "1")

    parts = [(10, 1.0), (20, 5.0)]
    stream, resumed = (PromptStream(Rows(dataset), 3, parts=parts) for _ in range(2))
    for _ in range(300):
        stream.next(7)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert [resumed.next(7) for _ in range(50)] == [stream.next(7) for _ in range(50)]


def test_a_prompt_with_a_token_outside_the_embedding_is_reported(tmp_path, tokenizer):
    config = write(tmp_path / "a.jsonl", {"problem": "1+1", "answer": "2"}, {"problem": "1+~", "answer": "2"})
    prompts, largest = load_prompts(config, tokenizer), tokenizer.convert_tokens_to_ids("~")
    check_embedding(prompts, tokenizer, largest + 1)
    with pytest.raises(DataError, match=rf"a.jsonl:2: .*token '~' \({largest}\).*embedding has {largest} rows"):
        check_embedding(prompts, tokenizer, largest)


def test_a_pattern_that_takes_exponential_time_is_one_message(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"problem": "1", "answer": "a" * 60 + "b"}) + "\n")
    with pytest.raises(DataError, match=r"data.answer_regex=\(a\|aa\)\+\$ takes more than 1 s for 'aaa"):
        load_prompts(DataConfig(source=str(tmp_path / "a.jsonl"), answer_regex="(a|aa)+$", template="plain"), tokenizer)


@pytest.mark.parametrize(
    ("stored", "answer"),
    [('["34"]', "34"), ('["\\\\frac{1}{2}", "0.5"]', "\\frac{1}{2}, 0.5"), ("[1, 2]", "[1, 2]"), ('["34"', '["34"')],
)
def test_a_list_of_answers_stored_as_text_is_a_list(tmp_path, tokenizer, stored, answer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"problem": "1", "answer": stored}) + "\n")
    prompts = load_prompts(DataConfig(source=str(tmp_path / "a.jsonl"), template="plain"), tokenizer)
    assert prompts[0].answer == answer
