"""Benchmark files: the shipped ones read rows in the columns of their datasets; mistakes in a file are one message."""

from __future__ import annotations

import json
import re

import benchmark_rows
import pytest

from megatron_g2rl.config.benchmark import (
    Benchmark,
    read_benchmarks,
    setting_problems,
    shipped_benchmarks,
    with_options,
)
from megatron_g2rl.config.checks import check_config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.ledger import batch_ledger
from megatron_g2rl.config.tree import Config
from megatron_g2rl.config.world import longest_generation
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.evaluation.evaluate import load_benchmark
from megatron_g2rl.rewards import choice_reward, math_reward, task_reward
from megatron_g2rl.rewards.choices import last_letter

REWARDS = {"boxed": math_reward, "letter": choice_reward}


class Words:
    """Stand-in for a tokenizer: one token per character."""

    chat_template, name_or_path, bos_token_id = None, "words", None

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [list(map(ord, text)) for text in texts]}


class NoColumns:
    """Stand-in for reward functions that take no columns."""

    possible_columns: set[str] = set()

    def bind(self, columns):
        return set()


class TaskColumns(NoColumns):
    """Stand-in for the reward function of the built-in tasks."""

    possible_columns = {"problem", "builtin_task"}


def make_config(**evaluation) -> Config:
    return Config(
        model={"path": "org/model"},
        data={"source": "builtin:arithmetic", "template": "plain", "plain_template": "{problem}\n"},
        trainer={"steps": 4},
        evaluation=evaluation or None,
    )


def load(tmp_path, name: str, **changes):
    benchmark = read_benchmarks([name])[name]
    folder = benchmark_rows.write(tmp_path / name, name, benchmark.subset, benchmark.split)
    benchmark = benchmark.model_copy(update={"source": str(folder), **changes})
    return benchmark, load_benchmark(make_config(), name, benchmark, Words(), NoColumns())


def test_the_shipped_benchmarks_are_the_tested_ones():
    assert shipped_benchmarks() == sorted(benchmark_rows.ROWS)
    assert list(read_benchmarks(shipped_benchmarks())) == shipped_benchmarks()


@pytest.mark.parametrize("name", benchmark_rows.ROWS)
def test_a_shipped_benchmark_reads_the_columns_of_its_dataset_and_scores_the_reference_as_correct(tmp_path, name):
    benchmark, prompts = load(tmp_path, name)
    assert len(prompts) == benchmark_rows.COUNT
    reward = REWARDS[benchmark.answer]
    for n, prompt in enumerate(prompts):
        row = benchmark_rows.ROWS[name](n)
        assert str(row[benchmark.prompt_column]).strip() in prompt.text
        assert reward(f"So \\boxed{{{prompt.answer}}}.", prompt.answer) == 1.0
        assert reward("So \\boxed{987}.", prompt.answer) == reward("I give up.", prompt.answer) == -1.0


def test_a_built_in_task_is_a_benchmark_without_a_file():
    benchmark = read_benchmarks(["builtin:sorting", "math500"])["sorting"]
    assert benchmark.source == "builtin:sorting" and benchmark.samples == 32
    prompts = load_benchmark(make_config(), "sorting", benchmark, Words(), TaskColumns())
    assert len(prompts) == benchmark.problems == 256
    for prompt in prompts[:5]:
        right = task_reward(f"\\boxed{{{prompt.answer}}}", prompt.answer, **prompt.columns)
        assert right["correct"] and prompt.columns["problem"] in prompt.text
    with pytest.raises(ConfigError, match="no built-in task 'chess'; available: arithmetic, countdown"):
        read_benchmarks(["builtin:chess"])


def lettered(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-J])\. (.+)$", text, re.MULTILINE))


def test_options_in_columns_are_shuffled_the_same_way_every_time_and_keep_the_correct_one(tmp_path):
    _, prompts = load(tmp_path, "gpqa_diamond")
    for n, prompt in enumerate(prompts):
        row = benchmark_rows.ROWS["gpqa_diamond"](n)
        options = lettered(prompt.text)
        wanted = {row[column].strip() for column in row if "Answer" in column}
        assert set(options.values()) == wanted and options[prompt.answer] == row["Correct Answer"]
    assert len({prompt.answer for prompt in prompts}) > 1
    _, again = load(tmp_path / "again", "gpqa_diamond")
    assert [prompt.text for prompt in again] == [prompt.text for prompt in prompts]


def test_options_in_a_list_keep_their_order_and_letters_without_the_fillers_at_the_end(tmp_path):
    _, prompts = load(tmp_path, "mmlu_pro")
    for n, prompt in enumerate(prompts):
        row = benchmark_rows.ROWS["mmlu_pro"](n)
        assert list(lettered(prompt.text).values()) == [option for option in row["options"] if option != "N/A"]
        assert prompt.answer == row["answer"]
    _, by_index = load(tmp_path / "index", "mmlu_pro", answer_column="answer_index")
    assert [prompt.answer for prompt in by_index] == [prompt.answer for prompt in prompts]


def test_a_wrong_column_is_named_with_the_columns_that_exist(tmp_path):
    for change, named in [
        (
            {"prompt_column": "text"},
            "benchmark mmlu_pro: prompt_column: .* has no column 'text'; its columns are .*options",
        ),
        ({"choices": ("choices",)}, "benchmark mmlu_pro: choices: .* has no column 'choices'"),
        ({"choices": ("question",)}, "'question' is not a list of 2 to 26 options"),
        ({"answer_column": "category"}, "column 'category' has 'BUSINESS', not one of ABCD"),
    ]:
        with pytest.raises(DataError, match=named):
            load(tmp_path / str(change), "mmlu_pro", **change)


def test_a_number_of_problems_selects_the_same_ones_and_too_many_are_refused(tmp_path):
    _, some = load(tmp_path / "a", "aime25", problems=3)
    _, again = load(tmp_path / "b", "aime25", problems=3)
    assert [p.id for p in some] == [p.id for p in again] and len({p.id for p in some}) == 3
    with pytest.raises(ConfigError, match="problems=9, but benchmark aime25 has only 5"):
        load(tmp_path / "c", "aime25", problems=9)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("\\boxed{B}", "B"),
        ("\\boxed{\\text{(c)}}", "C"),
        ("\\boxed{(D) 12 m}", "D"),
        ("\\boxed{A. red}", "A"),
        ("The answer is (B).", "B"),
        ("The answer is **C**", "C"),
        ("Answer: A", "A"),
        ("Answer: A\nor not? The correct option is D because", "D"),
        ("The answer is A good one", None),
        ("answer: \\boxed{12}", None),
        ("<think>the answer is B", None),
        ("<think>answer: B</think>Answer: C", "C"),
        ("Bananas are the answer. I think so", None),
        ("", None),
    ],
)
def test_the_letter_of_a_response(text, letter):
    assert last_letter(text) == letter


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"samples": 4}, "maj@16, pass@16 of more responses than samples=4"),
        ({"temperature": 0}, "gives the same response 16 times"),
        ({"temperature": 0, "samples": 1, "metrics": ["pass@1"], "top_p": 0.9}, "have no effect"),
        ({"prompt": "Solve it"}, r"prompt has no \{problem\}"),
        ({"choices": ["a"]}, "prompt needs {choices}"),
        ({"prompt": "{problem} {choices}"}, "prompt needs {choices}"),
        ({"prompt": "{problem} {choices}", "choices": ["a", "b"]}, "answer_column=answer must be one of choices"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, settings, named):
    assert not list(setting_problems(Benchmark(source="x")))
    (tmp_path / "mine.yaml").write_text(json.dumps({"source": "x.jsonl", **settings}))
    with pytest.raises(ConfigError, match=re.escape(named) if "\\" not in named else named):
        read_benchmarks([str(tmp_path / "mine.yaml")])


def test_all_mistakes_of_all_benchmarks_are_one_message_that_names_the_known_ones(tmp_path):
    (tmp_path / "mine.yaml").write_text("source: x\nsample: 3\nmetrics: [pass@0]\n")
    with pytest.raises(ConfigError) as error:
        read_benchmarks(["maht500", str(tmp_path / "mine.yaml"), "./none.yaml"])
    message = str(error.value)
    assert ", ".join(shipped_benchmarks()) in message and "did you mean math500?" in message
    assert "mine.yaml:2" in message and "samples" in message and "mine.yaml:3" in message
    assert "there is no benchmark file ./none.yaml" in message


def test_fewer_samples_lower_the_metrics_and_the_rest_stays():
    changed = with_options(read_benchmarks(["gpqa_diamond"])["gpqa_diamond"], {"samples": 8, "top_p": None})
    assert changed.metrics == ("pass@1", "maj@8", "pass@8") and changed.samples == 8 and changed.top_p == 1.0
    greedy = with_options(changed, {"samples": 1, "temperature": 0.0})
    assert greedy.metrics == ("pass@1", "maj@1") and greedy.temperature == 0


def test_benchmarks_of_a_run_are_checked_counted_and_have_room_in_the_engine():
    with pytest.raises(ConfigError, match=r"evaluation\.benchmarks: unknown benchmark 'aime42'"):
        check_config(make_config(benchmarks=["aime42"]), ranks=1)
    config = make_config(benchmarks=["aime24", "mmlu_pro"], max_response_tokens=30_000)
    rows = {row.name: row.value for row in batch_ledger(config, 1)}
    assert rows["responses of aime24 per evaluation"] == "16 x all" and "responses per evaluation" not in rows
    assert longest_generation(config) == 4096 + 30_000
    both = make_config(benchmarks=["aime24"], source="builtin:arithmetic")
    assert "responses per evaluation" in {row.name for row in batch_ledger(both, 1)}


@pytest.mark.parametrize("evaluation", [None, {}])
def test_a_trial_on_few_rows_reads_benchmarks_completely(evaluation):
    config = Config(model={"path": "none"}, data={"source": "none", "max_rows": 5}, evaluation=evaluation)
    assert read_benchmarks(["math500"])["math500"].data(config).max_rows is None
