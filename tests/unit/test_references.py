"""References that no response can match are reported at the start, with their lines and a key that fixes them."""

from __future__ import annotations

import json

import pytest

from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.config.sections.rewards import RewardConfig
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.data.prompts import load_prompts
from megatron_g2rl.data.references import AS_VALUE, UNVERIFIABLE, VERBATIM, is_plain, prose_fault, verify_reference
from megatron_g2rl.data.tiny_model import make_tokenizer

FINAL = ["72", "1,000", "B", r"\frac{1}{2}", "(1,2)", r"\{1,2\}", "[0,1)", r"\text{Friday}", "x^2+1", r"12 \text{ cm}"]
FINAL += ["100 dollars", "3:2", r"5\%", "east", r"x \in (0,1]", r"\text{two red and one blue}"]
PROSE = ["so 5+5 = 10 #### 72", r"thus \boxed{5}.", "see figure", "the answer is 5 of course", "9" * 5000]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def dataset(folder, tokenizer, answers, **changes):
    file = folder / "rows.jsonl"
    rows = [{"problem": f"1+{n}", "answer": answer} for n, answer in enumerate(answers)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(DataConfig(source=str(file), **changes), tokenizer)


def refused(prompts) -> str:
    with pytest.raises(DataError) as error:
        prompts.references(RewardConfig(workers=1)).check(prompts.config)
    return str(error.value)


def test_final_answers_are_not_prose_and_solutions_are():
    assert not [answer for answer in FINAL if prose_fault(answer)]
    assert all(prose_fault(answer) for answer in PROSE)


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        (r"\frac{3}{4}", AS_VALUE),
        (r"2\sqrt{3}", AS_VALUE),
        (r"\{1,2\}", AS_VALUE),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", VERBATIM),
        (r"\frac{", UNVERIFIABLE),
    ],
)
def test_a_reference_is_verified_against_its_value_and_against_itself(answer, verdict):
    assert verify_reference("", answer) == verdict


def test_plain_numbers_need_no_verification(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("megatron_g2rl.data.references.RewardPool", lambda *a: pytest.fail("a pool was started"))
    assert all(map(is_plain, ["7", "-1.5", "1,234,567", "3/4", "C"]))
    found = dataset(tmp_path, tokenizer, ["7", "-1.5", "3/4", "C"]).references(RewardConfig())
    assert found.counts["plain"] == 4 and not found.unverifiable_fraction


def test_raw_gsm8k_solutions_are_refused_with_their_lines_and_the_preset_to_use(tmp_path, tokenizer):
    rows = [f"He has {n} + {n} = {2 * n}.\n#### {2 * n}" for n in range(8)]
    message = refused(dataset(tmp_path, tokenizer, rows))
    assert "100.0% of the reference answers" in message and "data.answer_regex=gsm8k" in message
    assert f"{tmp_path / 'rows.jsonl'}:5" in message and "and 3 more" in message and "rows.jsonl:6" not in message
    prompts = dataset(tmp_path, tokenizer, rows, answer_regex="gsm8k")
    assert [prompt.answer for prompt in prompts] == [str(2 * n) for n in range(8)]
    assert prompts.references(RewardConfig()).unverifiable_fraction == 0


def test_a_few_references_may_be_unverifiable_and_the_key_allows_more(tmp_path, tokenizer, caplog):
    few = dataset(tmp_path, tokenizer, ["7"] * 99 + ["see figure"])
    few.references(RewardConfig()).check(few.config)
    assert "rows.jsonl:100: 'see figure' is prose" in caplog.text
    assert "5.0%" in refused(dataset(tmp_path, tokenizer, ["7"] * 19 + ["see figure"]))
    allowed = dataset(tmp_path, tokenizer, ["7"] * 19 + ["see figure"], max_unverifiable=0.05)
    allowed.references(RewardConfig()).check(allowed.config)


def test_references_that_do_not_verify_against_themselves_are_counted(tmp_path, tokenizer):
    message = refused(dataset(tmp_path, tokenizer, ["7", r"\frac{", r"\frac{1}{2}"]))
    assert r"rows.jsonl:2: '\\frac{' is rejected by the verifier against itself" in message and "1 value" in message
