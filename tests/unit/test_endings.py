"""Stop tokens of responses for every kind of chat template, and which responses count as complete."""

from __future__ import annotations

import time

import pytest
import torch
from chatml_model import QWEN_TEMPLATE, TURN_END, make_chatml_model
from tokenizers import processors

from megatron_g2rl.config import Config
from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.data.prompts import load_prompts
from megatron_g2rl.data.templates import check_template, encode_texts
from megatron_g2rl.data.tiny_model import make_random_model, make_tokenizer
from megatron_g2rl.records import Prompt, Response, ResponseGroup
from megatron_g2rl.rollout.endings import Endings, count_as_complete, read_endings, turn_end
from megatron_g2rl.rollout.engine import RolloutError, RolloutRequest, Sampling
from megatron_g2rl.rollout.tokenizer import load_tokenizer
from megatron_g2rl.rollout.transformers import TransformersEngine

CHAT = DataConfig(source="x", system_prompt="")


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return make_chatml_model(tmp_path_factory.mktemp("chatml") / "model", eagerness=4.0)


def make_config(folder, **sections) -> Config:
    return Config(
        model={"path": str(folder)}, data={"source": "builtin:arithmetic"} | sections.pop("data", {}), **sections
    )


def test_a_base_model_stops_at_its_end_of_turn_and_its_end_of_sequence(chatml):
    tokenizer = load_tokenizer(str(chatml))
    found = read_endings(make_config(chatml), str(chatml), tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(found.token_ids))
    assert sorted(names) == ["<|endoftext|>", "<|im_end|>"] and not found.strings
    assert f"{TURN_END} (" in found.described and "chat template" in found.described
    assert "generation_config.json, tokenizer" in found.described
    plain = read_endings(make_config(chatml, data={"template": "plain"}), str(chatml), tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(plain.token_ids)) == ["<|endoftext|>"]


TURNS = {
    "qwen": (QWEN_TEMPLATE, "<|im_end|>", ""),
    "a_space_before": ("{% for m in messages %}{{ m.content }} <|im_end|>\n{% endfor %}", "<|im_end|>", ""),
    "a_text": ("{% for m in messages %}{{ m.content }}\n[END]\n{% endfor %}", None, "[END]"),
    "nothing": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None, ""),
    "the_eos": ("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}", "<|endoftext|>", ""),
    "no_answers": ("{{ messages[0].content }}", None, ""),
}


@pytest.mark.parametrize("name", TURNS)
def test_the_end_of_turn_token_is_read_from_the_template(chatml, name):
    template, token, text = TURNS[name]
    tokenizer = load_tokenizer(str(chatml))
    tokenizer.chat_template = template
    expected = None if token is None else tokenizer.convert_tokens_to_ids(token)
    assert turn_end(CHAT, tokenizer) == (expected, text)


def test_stop_strings_become_tokens_where_the_tokenizer_has_them(chatml):
    tokenizer = load_tokenizer(str(chatml))
    config = make_config(chatml, rollout={"stop": ["</think>", "\n\nProblem:"]}, data={"template": "plain"})
    found = read_endings(config, str(chatml), tokenizer)
    assert tokenizer.convert_tokens_to_ids("</think>") in found.token_ids
    assert found.strings == ("\n\nProblem:",) and "the text '\\n\\nProblem:' (rollout.stop)" in found.described


def test_a_run_without_any_stop_token_is_refused(chatml, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    make_random_model(tmp_path, "qwen3")
    for name in ("config.json", "generation_config.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace('"eos_token_id": 1', '"eos_token_id": null'))
    config = make_config(tmp_path, data={"template": "plain"})
    with pytest.raises(RolloutError, match="names an end-of-sequence token"):
        read_endings(config, str(tmp_path), tokenizer)
    stopped = make_config(tmp_path, data={"template": "plain"}, rollout={"stop": ["."]})
    assert read_endings(stopped, str(tmp_path), tokenizer).strings == (".",)


def draw(folder, endings: Endings, tokens: int) -> list[Response]:
    engine = TransformersEngine(str(folder), dtype=torch.float32, device=torch.device("cpu"), endings=endings)
    prompts = [Prompt(n, "", (10 + n, 12, 13), "") for n in range(4)]
    return [r for g in engine.generate(RolloutRequest(prompts, Sampling(8, 1.0, tokens, 0, 0))) for r in g.responses]


def test_responses_end_with_the_end_of_turn_token(chatml):
    tokenizer = load_tokenizer(str(chatml))
    endings, end = read_endings(make_config(chatml), str(chatml), tokenizer), tokenizer.convert_tokens_to_ids(TURN_END)
    responses = draw(chatml, endings, 200)
    assert all(r.finish_reason == "stop" and r.token_ids[-1] in endings.token_ids for r in responses)
    assert all(r.token_ids.count(end) <= 1 for r in responses) and max(len(r.token_ids) for r in responses) > 1
    before = draw(chatml, Endings(endings.token_ids[:1]), 200)  # what a run that only knows the eos token draws
    assert any(r.token_ids.count(end) > 1 for r in before)


def test_a_stop_string_ends_a_response_and_is_part_of_it(tmp_path):
    make_random_model(tmp_path, "qwen3")
    free = draw(tmp_path, Endings((1,)), 60)
    stop = next(r.text[20:22] for r in free if len(r.text) > 30)
    stopped = draw(tmp_path, Endings((1,), (stop, "never to be seen")), 60)
    for one, other in zip(stopped, free, strict=True):
        assert one.token_ids == other.token_ids[: len(one.token_ids)]
        place = other.text.find(stop)
        assert one.text == (other.text if place < 0 else other.text[: place + 2])
        assert one.finish_reason == (other.finish_reason if place < 0 else "stop")
    assert any(len(a.text) < len(b.text) for a, b in zip(stopped, free, strict=True))


def response(text: str, reason: str = "stop", ids: tuple[int, ...] = (5,)) -> Response:
    return Response(ids, (0.0,) * len(ids), text, reason, 0)


@pytest.mark.parametrize(
    ("prompt", "answer", "complete"),
    [
        ("1+1", response("2"), True),
        ("1+1", response("2", "length"), False),
        ("1+1<think>\n", response("so 2, wait"), False),
        ("1+1<think>\n", response("so </think> 2"), True),
        (
            "1+1<think>\n",
            response("so 2", ids=(5, 77)),
            True,
        ),  # </think> is a special token that is missing from the text
        ("1+1<think>\n\n</think>\n\n", response("2"), True),
        ("what is <think>?", response("2"), True),
        ("1+1", response("<think> 2"), False),
    ],
)
def test_truncated_responses_and_unfinished_thinking_are_incomplete_unless_allowed(prompt, answer, complete):
    group = ResponseGroup(Prompt(0, prompt, (1,), "2"), (answer,))
    endings = Endings((1,), end_think_id=77)
    assert count_as_complete([group], endings, "wrong") == [complete]
    assert count_as_complete([group], endings, "scored") == [True]


def test_template_variables_reach_the_prompt(chatml, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    tokenizer = load_tokenizer(str(chatml))
    data = DataConfig(source=str(tmp_path / "a.jsonl"), chat_template_kwargs={"enable_thinking": False})
    assert load_prompts(data, tokenizer)[0].text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


LOOPS = {
    "range": ("{% for a in range(10**9) %}x{% endfor %}", "failed: .*Range too big"),
    "nested": (
        "{% for a in range(99999) %}{% for a in range(99999) %}{% endfor %}{% endfor %}",
        "did not end within 1 s",
    ),
    "memory": ("{{ 'x' * 10**11 }}", "takes more than"),
    "output": ("{{ 'x' * 10**7 }}", "renders a short conversation to 1048577 characters"),
    "syntax": ("{% for %}", "failed"),
    "division": ("{{ 1 / 0 }}", "failed: ZeroDivisionError: division by zero"),
    "attribute": ("{{ messages.a.b }}", "failed"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_chat_template_is_bounded_in_time_memory_and_length(name, monkeypatch):
    monkeypatch.setattr("megatron_g2rl.data.templates.TEMPLATE_SECONDS", 1 if name == "nested" else 60)
    template, message = LOOPS[name]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    start = time.monotonic()
    with pytest.raises(DataError, match=message):
        check_template(CHAT, tokenizer)
    assert time.monotonic() - start < 60


def test_a_template_that_leaves_out_the_problem_or_the_system_prompt_is_reported(chatml, caplog):
    tokenizer = load_tokenizer(str(chatml))
    tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}!{% endfor %}"
    )
    with pytest.raises(DataError, match="omits the problem"):
        check_template(CHAT, tokenizer)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    check_template(CHAT.model_copy(update={"system_prompt": "Add."}), tokenizer)
    assert "omits data.system_prompt" in caplog.text


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "messages", "truncation", "chat_template"])
def test_rendering_options_are_refused_as_template_variables(chatml, name):
    data = CHAT.model_copy(update={"chat_template_kwargs": {name: True}})
    with pytest.raises(DataError, match=f"data.chat_template_kwargs: {name} is reserved"):
        check_template(data, load_tokenizer(str(chatml)))


def test_a_second_beginning_of_sequence_token_is_omitted():
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<system>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<system> $A", special_tokens=[("<system>", tokenizer.bos_token_id)]
    )
    plain = DataConfig(source="x", template="plain")
    once = encode_texts(["1+1"], plain, tokenizer)
    assert once[0][0] == tokenizer.bos_token_id and encode_texts(["<system>1+1"], plain, tokenizer) == once
    assert encode_texts(["<system>1+1"], CHAT, tokenizer) == once


def test_an_empty_tokenizer_is_reported_in_one_message(tmp_path):
    make_random_model(tmp_path, "qwen3")
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, '
        '"pre_tokenizer": null, "post_processor": null, "decoder": null, '
        '"model": {"type": "BPE", "vocab": {}, "merges": []}}'
    )
    with pytest.raises(RolloutError, match="tokenizer"):
        load_tokenizer(str(tmp_path))
