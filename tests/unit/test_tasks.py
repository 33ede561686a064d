"""The built-in tasks and their model: answers, many paths, disjoint splits, and folders that transformers reads."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations, permutations

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_g2rl.data.tasks import DATASET_SEED
from megatron_g2rl.data.tasks.arithmetic import Arithmetic
from megatron_g2rl.data.tasks.countdown import Countdown
from megatron_g2rl.data.tiny_model import (
    TinyModel,
    demonstrations,
    make_random_model,
    make_tiny_model,
    make_tokenizer,
    mixed_demonstrations,
)
from megatron_g2rl.registry import TASK_RULES, TASKS

TASK = TASKS["arithmetic"]


def test_the_answer_is_what_python_computes():
    for index in range(200):
        problem, answer = TASK.problem(index, seed=3)
        assert re.fullmatch(r"\d(\+\d){4}", problem)
        assert str(eval(problem)) == answer


def test_every_step_of_a_demonstration_is_equal_to_the_problem():
    for index in range(200):
        problem, answer = TASK.problem(index, seed=3)
        chain, boxed = TASK.demonstration(index, seed=3).split("\\boxed{")
        assert boxed == answer + "}"
        links = chain.removeprefix("=").split("=")
        assert [str(eval(link)) for link in links] == [answer] * len(links)
        numbers = [len(re.findall(r"\d+", text)) for text in [problem, *links]]
        assert numbers == [5, 4, 3, 2, 1]


def test_a_problem_has_many_solution_paths(monkeypatch):
    monkeypatch.setattr(Arithmetic, "_numbers", lambda self, index, seed, split: [1, 2, 4, 8, 16])
    paths = {TASK.demonstration(index, seed=0) for index in range(5000)}
    # 10 pairs, then 6, then 3, then 1; powers of two join to a different sum in every order
    assert len(paths) == 180


def test_problems_are_a_function_of_split_seed_and_index():
    assert TASK.problem(5, 1) == TASK.problem(5, 1)
    assert TASK.demonstration(5, 1) == TASK.demonstration(5, 1)
    assert TASK.problem(5, 1) != TASK.problem(5, 2)
    assert TASK.problem(5, 1) != TASK.problem(6, 1)


def test_no_test_problem_is_a_train_problem_in_another_order():
    def numbers(split, seed, count):
        problems = (TASK.problem(index, seed, split)[0] for index in range(count))
        return {tuple(sorted(map(int, re.findall(r"\d+", problem)))) for problem in problems}

    train = numbers("train", DATASET_SEED, 5000) | numbers("train", 0, 5000)
    assert not train & numbers("test", DATASET_SEED, 512)


def test_the_reward_function_accepts_demonstrations_and_refuses_other_answers():
    rewards = pytest.importorskip("megatron_g2rl.rewards", reason="the reward functions are not there yet")
    for index in range(20):
        _, answer = TASK.problem(index, seed=7)
        response = TASK.demonstration(index, seed=7)
        assert rewards.math_reward(response, answer) == 1.0
        assert rewards.math_reward(response, str(int(answer) + 1)) == -1.0


@pytest.mark.parametrize("name", [name for name in TASKS if name != "arithmetic"])
def test_a_task_is_a_function_of_split_seed_and_index_and_its_rules_accept_its_solutions(name):
    task, splits = TASKS[name], {}
    verify = TASK_RULES[task.name]
    for split in ("train", "test"):
        problems = [task.problem(index, DATASET_SEED, split) for index in range(60)]
        assert problems[50:] == [task.problem(index, DATASET_SEED, split) for index in range(50, 60)]
        for index, (text, answer) in enumerate(problems):
            response = task.demonstration(index, DATASET_SEED, split)
            assert response == task.demonstration(index, DATASET_SEED, split)
            assert verify(response, answer, text).is_correct, (text, response)
        splits[split] = {text for text, _ in problems}
    assert len(splits["train"]) == len(splits["test"]) == 60 and not splits["train"] & splits["test"]
    assert task.problem(3, 1) != task.problem(3, 2)


@pytest.mark.parametrize("name, pattern", [("countdown", r"\d+(?=[ :])"), ("sorting", r"\d")])
def test_no_test_problem_has_the_numbers_of_a_train_problem_in_another_order(name, pattern):
    def numbers(split, seed, count):
        texts = (TASKS[name].problem(index, seed, split)[0] for index in range(count))
        return {tuple(sorted(map(int, re.findall(pattern, text)))) for text in texts}

    train = numbers("train", DATASET_SEED, 600) | numbers("train", 0, 600)
    assert not train & numbers("test", DATASET_SEED, 256)


def test_targets_of_countdown_have_several_forms_and_none_is_one_step_away():
    task, most = TASKS["countdown"], 0
    for index in range(40):
        text = task.problem(index, DATASET_SEED, "test")[0]
        numbers, target = [int(number) for number in text.partition(":")[0].split()], int(text.partition(":")[2])
        pairs = list(permutations(numbers, 2))
        assert 1 <= target <= 99 and target not in [*numbers, *(eval(f"{a}{o}{b}") for a, b in pairs for o in "+-*")]
        # an independent search over values, without forms: every tree of two or three steps that reaches the target
        assert target in reachable(tuple(sorted(numbers)))
        responses = {task.demonstration(index, seed, "test") for seed in [DATASET_SEED]}
        most = max(most, *(response.count("=") for response in responses))
    assert most == 3
    texts = [task.problem(index, DATASET_SEED, "test")[0] for index in range(256)]
    assert len({(*sorted(text.partition(":")[0].split()), text.partition(":")[2]) for text in texts}) == 256


def reachable(numbers: tuple[int, ...]) -> set[int]:
    """All values from 1 to 99 that chains of steps over these numbers reach."""
    found = set(numbers)
    for i, j in combinations(range(len(numbers)), 2):
        rest = [number for place, number in enumerate(numbers) if place not in (i, j)]
        a, b = numbers[i], numbers[j]
        for value in {a + b, abs(a - b), a * b}:
            if 1 <= value <= 99:
                found |= reachable(tuple(sorted([*rest, value])))
    return found


def test_demonstrations_of_countdown_choose_every_form_equally_often(monkeypatch):
    task = Countdown()
    monkeypatch.setattr(Countdown, "_problem", lambda *_: ((3, 3, 5, 2), 12))
    forms = Counter(
        TASK_RULES["countdown"](task.demonstration(index, 0), "", "3 3 5 2:12").form for index in range(1500)
    )
    assert len(forms) >= 3
    # five standard errors of a count
    expected = 1500 / len(forms)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in forms.values()), forms


def test_the_tokenizer_restores_every_text_and_does_not_split_words():
    tokenizer = make_tokenizer(TASK.words)
    text = "Line 1:\n  a, b = {c} <|x|> it 's \\boxed{-12} ~!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text) - len("\\boxed{") + 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.unk_token_id in tokenizer("ü")["input_ids"]


def test_demonstrations_are_chat_template_prompts_and_terminated_responses(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path, task=TASK, seed=0))
    pairs = demonstrations(TASK, tokenizer, 50, seed=4)
    assert len(pairs) == 50
    for index, (prompt, response) in enumerate(pairs):
        problem, answer = TASK.problem(index, 4)
        assert prompt.text == f"<user>{problem}<end><assistant>"
        assert tokenizer.decode(prompt.token_ids) == prompt.text
        assert prompt.answer == answer
        assert response[-1] == tokenizer.eos_token_id and response.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(response, skip_special_tokens=True) == TASK.demonstration(index, 4)
        assert len(response) <= 64


def test_worked_examples_of_several_tasks_take_turns():
    tasks, tokenizer = [TASKS["sorting"], TASKS["tracking"]], make_tokenizer(TASK.words)
    found = [prompt.text for prompt, _ in mixed_demonstrations(tasks, tokenizer, 5, seed=4)]
    expected = [tasks[i % 2].problem(i // 2, 4)[0] for i in range(5)]
    assert found == [f"<user>{text}<end><assistant>" for text in expected]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen2"])
def test_a_random_folder_loads_in_transformers_as_its_family(tmp_path, architecture, tied):
    size = TinyModel(hidden=64, layers=2, head_size=16, mlp_hidden=96, tied=tied)
    model = AutoModelForCausalLM.from_pretrained(make_random_model(tmp_path, architecture, size=size, noise=0.1))
    assert model.config.model_type == architecture
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert ("lm_head.weight" in names) != tied
    assert ("model.layers.0.self_attn.q_norm.weight" in names) == (architecture == "qwen3")
    assert ("model.layers.0.self_attn.q_proj.bias" in names) == (architecture == "qwen2")
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    assert all(vector.std() > 0.01 for vector in vectors)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id


def test_the_same_seed_makes_the_same_model_and_the_global_generator_is_unchanged(tmp_path):
    before = torch.random.get_rng_state()
    folders = [make_tiny_model(tmp_path / str(n), task=TASK, seed=seed) for n, seed in enumerate([1, 1, 2])]
    assert torch.equal(before, torch.random.get_rng_state())
    first, same, other = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert first == same != other


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot hold the tokenizer's 102 tokens"):
        make_random_model(tmp_path, "qwen3", size=TinyModel(vocabulary=100))
