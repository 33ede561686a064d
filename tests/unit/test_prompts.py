"""Prompts: every kind of source, every kind of invalid row, the templates, and a resumable order."""

from __future__ import annotations

import json
import logging

import datasets
import pytest
from tokenizers import processors

from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.config.sections.evaluation import EvaluationConfig
from megatron_g2rl.data import sources
from megatron_g2rl.data.prompts import PromptStream, load_prompts
from megatron_g2rl.data.sources import DataError
from megatron_g2rl.data.tiny_model import make_tokenizer
from megatron_g2rl.records import Prompt

ROWS = [{"problem": f"1+{n}", "answer": str(n + 1)} for n in range(5)]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def config(source, **changes) -> DataConfig:
    return DataConfig(source=str(source), **{"system_prompt": "", **changes})


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def contents(dataset):
    return [(prompt.id, prompt.answer) for prompt in dataset]


def test_jsonl_json_and_parquet_give_the_same_prompts(tmp_path, tokenizer):
    files = [write_lines(tmp_path / "a.jsonl", ROWS), tmp_path / "a.json", tmp_path / "a.parquet"]
    files[1].write_text(json.dumps(ROWS, indent=1))
    datasets.Dataset.from_list(ROWS).to_parquet(str(files[2]))
    for file in files:
        dataset = load_prompts(config(file), tokenizer)
        assert contents(dataset) == [(n, str(n + 1)) for n in range(5)]
        assert dataset[2].text == "<user>1+2<end><assistant>"
        assert dataset[2].token_ids == tuple(tokenizer(dataset[2].text)["input_ids"])
    assert load_prompts(config(files[0]), tokenizer)[2].source == f"{files[0]}:3"
    assert load_prompts(config(files[1]), tokenizer)[2].source == f"{files[1]}:10"  # each row spans four lines


def test_a_hub_name_is_loaded_by_datasets_with_subset_and_split(monkeypatch, tokenizer):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(sources.datasets, "load_dataset", load_dataset)
    dataset = load_prompts(config("someone/sums", subset="main", split="test"), tokenizer)
    assert asked == [(("someone/sums", "main"), {"split": "test"})]
    assert dataset[4].source == "someone/sums[test]:5"


def test_an_unavailable_hub_dataset_is_an_error_that_names_the_key(tokenizer):
    with pytest.raises(DataError, match="data.source='someone/nothing'.*loading it from the Hugging Face Hub failed"):
        load_prompts(config("someone/nothing"), tokenizer)


def test_a_folder_is_read_by_split_in_the_order_of_its_names(tmp_path, tokenizer):
    write_lines(tmp_path / "train-1.jsonl", ROWS[:2])
    datasets.Dataset.from_list(ROWS[2:4]).to_parquet(str(tmp_path / "train-2.parquet"))
    write_lines(tmp_path / "test" / "contest.jsonl", ROWS[4:])
    assert contents(load_prompts(config(tmp_path), tokenizer)) == [(0, "1"), (1, "2"), (2, "3"), (3, "4")]
    assert contents(load_prompts(config(tmp_path, split="test"), tokenizer)) == [(0, "5")]
    with pytest.raises(DataError, match="no files for 'validation'; it has test, train"):
        load_prompts(config(tmp_path, split="validation"), tokenizer)
    write_lines(tmp_path / "more.jsonl", ROWS)
    with pytest.raises(DataError, match="files named after a split .* and others, such as more.jsonl"):
        load_prompts(config(tmp_path), tokenizer)


def test_a_folder_without_split_names_is_the_train_split(tmp_path, tokenizer):
    write_lines(tmp_path / "b.jsonl", ROWS[:1])
    write_lines(tmp_path / "a.jsonl", ROWS[1:3])
    assert contents(load_prompts(config(tmp_path), tokenizer)) == [(0, "2"), (1, "3"), (2, "1")]


BAD_LINES = [
    ('{"problem": "1+1", "answer": "2"', "unreadable: Expecting ',' delimiter, column 33"),
    ("[1, 2]", "not a JSON object but list"),
    ({"problem": "1+1"}, "column 'answer' is missing"),
    ({"problem": None, "answer": "2"}, "column 'problem' is missing"),
    ({"problem": " ", "answer": "2"}, "column 'problem' is empty"),
    ({"problem": "1+1", "answer": {"a": "2"}}, "column 'answer' holds dict, not text"),
    ({"problem": 11, "answer": "2"}, "column 'problem' holds int, not text"),
    ({"problem": "1+1", "answer": True}, "column 'answer' holds bool, not text"),
    ({"problem": "1" * 50, "answer": "2"}, "53 tokens, over data.max_prompt_tokens=40"),
]


@pytest.mark.parametrize("line, fault", BAD_LINES)
def test_an_invalid_row_is_an_error_with_its_line_or_is_skipped_and_counted(tmp_path, tokenizer, caplog, line, fault):
    file = write_lines(tmp_path / "a.jsonl", [*ROWS[:2], "", line, *ROWS[2:]])
    message = f"{file}:4: {fault}"
    with pytest.raises(DataError) as error:
        load_prompts(config(file, max_prompt_tokens=40), tokenizer)
    assert message in str(error.value) and "1 of 6 rows" in str(error.value) and "on_bad_row=skip" in str(error.value)
    with caplog.at_level(logging.WARNING):
        dataset = load_prompts(config(file, max_prompt_tokens=40, on_bad_row="skip"), tokenizer)
    assert message in caplog.text
    assert dataset.report.bad.count == 1
    assert contents(dataset) == [(0, "1"), (1, "2"), (3, "3"), (4, "4"), (5, "5")]  # ids still count the invalid row


def test_only_the_first_rows_of_each_source_are_read_on_request(tmp_path, tokenizer):
    files = [write_lines(tmp_path / name, [*ROWS[:4], "{}"]) for name in ("a.jsonl", "b.jsonl")]
    sources = [dict(source=str(file)) for file in files]
    # The last row of each file is bad, and is not reached.
    dataset = load_prompts(DataConfig(sources=sources, max_rows=3, system_prompt=""), tokenizer)
    assert [prompt.source for prompt in dataset] == [f"{file}:{line}" for file in files for line in (1, 2, 3)]
    assert len(load_prompts(config(files[0], max_rows=9, on_bad_row="skip"), tokenizer)) == 4
    training = config(files[0], max_rows=3)
    assert EvaluationConfig().data(training).max_rows is None


def test_undecodable_bytes_are_an_invalid_row(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"problem": "1+1", "answer": "2"}\n{"problem": "\xff", "answer": "2"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: unreadable: 'utf-8' codec"):
        load_prompts(config(file), tokenizer)


def test_many_invalid_rows_are_counted_and_the_first_few_shown(tmp_path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [*ROWS, *["{"] * 8])
    with pytest.raises(DataError) as error:
        load_prompts(config(file), tokenizer)
    assert "8 of 13 rows" in str(error.value) and "and 3 more" in str(error.value)


def test_an_array_with_broken_syntax_is_an_error_with_its_line(tmp_path, tokenizer):
    (tmp_path / "a.json").write_text('[\n{"problem": "1+1", "answer": "2"},\n{"problem"\n]')
    with pytest.raises(DataError, match="a.json:4: invalid JSON"):
        load_prompts(config(tmp_path / "a.json", on_bad_row="skip"), tokenizer)


def test_a_broken_parquet_file_is_reported_by_name(tmp_path, tokenizer):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="a.parquet is not a readable parquet file"):
        load_prompts(config(tmp_path / "a.parquet"), tokenizer)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_missing_column_is_reported_with_the_existing_ones(tmp_path, tokenizer, name):
    write_lines(tmp_path / "a.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    message = r"data.prompt_column: .*no column 'question'; its columns are problem, answer"
    with pytest.raises(DataError, match=message):
        load_prompts(config(tmp_path / name, prompt_column="question", on_bad_row="skip"), tokenizer)


def test_a_missing_or_empty_source_is_an_error(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no file or folder './nothing.jsonl'"):
        load_prompts(config("./nothing.jsonl"), tokenizer)
    (tmp_path / "a.csv").write_text("problem,answer\n")
    with pytest.raises(DataError, match="a.csv has none of the extensions .jsonl, .json, .parquet"):
        load_prompts(config(tmp_path / "a.csv"), tokenizer)
    with pytest.raises(DataError, match="holds no .jsonl, .json, .parquet, .arrow, .jsonl.gz, .json.gz file"):
        load_prompts(config(tmp_path), tokenizer)
    with pytest.raises(DataError, match="has no rows"):
        load_prompts(config(write_lines(tmp_path / "a.jsonl", [])), tokenizer)
    with pytest.raises(DataError, match="1 of 1 rows .* no prompt is left"):
        load_prompts(config(write_lines(tmp_path / "b.jsonl", ["{"]), on_bad_row="skip"), tokenizer)


def test_numbers_are_accepted_as_answers(tmp_path, tokenizer):
    file = write_lines(tmp_path / "a.jsonl", [{"problem": "1", "answer": 7}, {"problem": "2", "answer": 0.5}])
    assert contents(load_prompts(config(file), tokenizer)) == [(0, "7"), (1, "0.5")]


def test_the_chat_template_gets_the_system_prompt_and_a_tokenizer_without_template_is_refused(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", ROWS)
    tokenizer = make_tokenizer()
    assert load_prompts(config(file, system_prompt="Add."), tokenizer)[1].text == (
        "<system>Add.<end><user>1+1<end><assistant>"
    )
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="no system role.*set data.system_prompt to an empty text"):
        load_prompts(config(file, system_prompt="Add."), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="set data.template=plain"):
        load_prompts(config(file), tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'x' * 10**11 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
    ],
)
def test_a_chat_template_that_fails_in_any_way_is_one_message(tmp_path, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match="the chat template of this model (failed|takes|did not end)"):
        load_prompts(config(write_lines(tmp_path / "a.jsonl", ROWS)), tokenizer)


def test_a_plain_prompt_fills_its_template_once_and_gets_the_beginning_of_sequence_token(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"problem": "{system}{x}", "answer": "1"}])
    tokenizer = make_tokenizer()
    plain = config(file, template="plain", plain_template="{system} {problem} {y}\n", system_prompt="{problem}")
    prompt = load_prompts(plain, tokenizer)[0]
    assert prompt.text == "{problem} {system}{x} {y}\n"
    start = tokenizer.convert_tokens_to_ids("<user>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", start)]
    )
    assert load_prompts(plain, tokenizer)[0].token_ids == (start, *prompt.token_ids)
    with pytest.raises(DataError, match="does not contain {problem}"):
        load_prompts(config(file, template="plain", plain_template="{question}"), tokenizer)


def test_the_built_in_task_is_a_source_with_two_splits(tokenizer):
    train, test = (load_prompts(config("builtin:arithmetic", split=split), tokenizer) for split in ["train", "test"])
    assert (len(train), len(test)) == (20_000, 512)
    assert not {prompt.text for prompt in train} & {prompt.text for prompt in test}
    with pytest.raises(DataError, match="no built-in task 'geometry'; available: arithmetic"):
        load_prompts(config("builtin:geometry"), tokenizer)
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        load_prompts(config("builtin:arithmetic", split="dev"), tokenizer)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, str(i), (i,), str(i)) for i in range(count)]


def ids(drawn: list[Prompt]) -> list[int]:
    return [prompt.id for prompt in drawn]


def test_each_epoch_has_every_prompt_once_in_a_different_order():
    stream = PromptStream(prompts(10), seed=1)
    epochs = [ids(stream.next(5)) + ids(stream.next(5)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert ids(PromptStream(prompts(10), seed=2).next(10)) != epochs[0]
    assert ids(PromptStream(prompts(10), seed=1, shuffle=False).next(10)) == list(range(10))


def test_no_draw_has_a_prompt_twice_or_an_excluded_one():
    for seed in range(20):
        stream = PromptStream(prompts(10), seed=seed)
        stream.next(7)
        drawn = ids(stream.next(8))
        assert len(set(drawn)) == 8
        assert not set(ids(stream.next(2, without=set(drawn)))) & set(drawn)
    with pytest.raises(ValueError, match="cannot draw 3"):
        stream.next(3, without=set(range(8)))


def test_a_resumed_stream_continues_where_it_was_saved():
    stream = PromptStream(prompts(10), seed=1)
    stream.next(7), stream.next(8)
    resumed = PromptStream(prompts(10), seed=1)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert resumed.next(9) == stream.next(9)


def test_real_problems_load_with_a_real_tokenizer(large_data_folder):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(large_data_folder / "qwen3_tokenizer/tokenizer.json"))
    plain = config(large_data_folder / "gsm8k_train.jsonl", template="plain")
    dataset = load_prompts(plain, tokenizer)
    assert len(dataset) == 7473 and dataset.report.bad.count == 0
    assert dataset[0].text.startswith("Natalia sold clips") and dataset[0].answer == "72"
    assert tokenizer.decode(dataset[0].token_ids) == dataset[0].text
