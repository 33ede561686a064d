"""Data columns that reward functions take reach the prompts with the types of the source."""

from __future__ import annotations

import datetime
import json

import datasets
import pytest

from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.config.tree import Config
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.data.prompts import load_prompts
from megatron_g2rl.data.tiny_model import make_tokenizer
from megatron_g2rl.evaluation.evaluate import load_own_set
from megatron_g2rl.rewards.binding import ALL_COLUMNS
from megatron_g2rl.training.contents import rows_digest

ROWS = [
    {
        "problem": f"1+{n}",
        "answer": str(n + 1),
        "level": n,
        "weight": n / 4,
        "extra_info": {"split": "train", "index": n},
        "tests": [f"a{n}", "b"],
        "name": f"row {n}é",
    }
    for n in range(4)
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(folder, rows=ROWS, kind="jsonl") -> DataConfig:
    file = folder / f"rows.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(source=str(file), system_prompt="")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_keep_their_values(tmp_path, tokenizer, kind):
    data = write(tmp_path, kind=kind)
    every = load_prompts(data, tokenizer, {ALL_COLUMNS})
    assert [prompt.columns for prompt in every] == ROWS and every[2].columns == ROWS[2]
    assert every.column_names == set(ROWS[0])
    some = load_prompts(data, tokenizer, {"level", "extra_info", "absent"})
    assert [p.columns for p in some] == [{name: row[name] for name in ("level", "extra_info")} for row in ROWS]
    none = load_prompts(data, tokenizer)
    assert all(prompt.columns == {} for prompt in none) and not none.has_columns


def test_types_missing_from_json_become_text_and_long_numbers_stay_text(tmp_path, tokenizer):
    day = datetime.date(2020, 1, 2)
    data = write(tmp_path, [{"problem": "1+1", "answer": "2", "day": day}], "parquet")
    assert load_prompts(data, tokenizer, {"day"})[0].columns == {"day": "2020-01-02"}
    (tmp_path / "odd.jsonl").write_text(
        '{"problem": "1+1", "answer": "2", "digits": ' + "7" * 5000 + ', "half": "\\ud800", "e": 1e3, "none": null}\n'
    )
    found = load_prompts(DataConfig(source=str(tmp_path / "odd.jsonl")), tokenizer, {ALL_COLUMNS})[0].columns
    assert (
        found["digits"] == "7" * 5000 and found["half"] == "\ud800" and found["e"] == 1000.0 and found["none"] is None
    )


def test_a_column_missing_from_a_row_is_none(tmp_path, tokenizer):
    data = write(tmp_path, [ROWS[0], {"problem": "2", "answer": "2"}])
    prompts = load_prompts(data, tokenizer, {"level"})
    assert [prompt.columns for prompt in prompts] == [{"level": 0}, {}] and "level" in prompts.column_names


def test_a_changed_column_changes_the_digest_only_if_a_reward_takes_it(tmp_path, tokenizer):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    before, after = write(tmp_path / "a"), write(tmp_path / "b", [row | {"level": 9} for row in ROWS])
    digests = [
        [rows_digest(load_prompts(data, tokenizer, columns)) for data in (before, after)]
        for columns in ((), {"absent"}, {"name"}, {"level"})
    ]
    assert [one == other for one, other in digests] == [True, True, True, False]
    assert digests[0] == digests[1], "a name that is no column changes no digest"


def test_an_evaluation_set_without_a_required_column_is_refused(tmp_path, tokenizer):
    data = write(tmp_path, [{"problem": "1", "answer": "1", "other": 2}])
    config = Config(model={"path": "m"}, data={"source": "s"}, evaluation={"source": data.source})
    assert load_own_set(config, tokenizer, {"other"}, {"other"})[0].columns == {"other": 2}
    with pytest.raises(DataError, match="no column level, which reward.function takes; it has answer, other, problem"):
        load_own_set(config, tokenizer, {"level"}, {"level"})
