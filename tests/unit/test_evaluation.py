"""Estimators against enumeration of every draw, and the evaluator with a rollout engine of known answers."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from itertools import combinations, permutations
from statistics import fmean

import pytest
import torch

from megatron_g2rl.config.checks import check_config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.ledger import batch_ledger
from megatron_g2rl.config.sections.run import TrainerConfig
from megatron_g2rl.config.tree import Config
from megatron_g2rl.data.sources import DataError
from megatron_g2rl.evaluation import majority_at_k, mean_at_k, pass_at_k
from megatron_g2rl.evaluation.evaluate import Evaluator, load_own_set
from megatron_g2rl.evaluation.periodic import PeriodicEvaluation
from megatron_g2rl.records import Prompt, Response, ResponseGroup, response_seed
from megatron_g2rl.rewards import math_reward
from megatron_g2rl.rewards.distribute import ScoredRewards
from megatron_g2rl.rollout.endings import Endings
from megatron_g2rl.rollout.engine import RolloutStopped

DRAWS = random.Random(0)


@pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (5, 2), (6, 1), (7, 7)])
def test_pass_at_k_is_the_fraction_of_all_draws_with_a_correct_response(n, right):
    correct = [True] * right + [False] * (n - right)
    for k in range(1, n + 1):
        assert pass_at_k(correct, k) == pytest.approx(fmean(any(draw) for draw in combinations(correct, k)))


def test_pass_at_1_is_the_mean_and_pass_at_n_is_1_if_any_response_is_correct():
    correct = [True, False, False, True, False]
    assert pass_at_k(correct, 1) == pytest.approx(mean_at_k(correct)) == pytest.approx(0.4)
    assert pass_at_k(correct, 5) == 1


def test_pass_at_k_is_exact_where_floating_point_binomials_overflow():
    assert pass_at_k([True] + [False] * 4095, 2048) == 0.5


def vote_with_a_random_tie_break(answers, truth, draws) -> bool:
    """Count votes, then draw among the most frequent."""
    counts = Counter(answer for answer in answers if answer is not None)
    if not counts:
        return False
    return draws.choice([a for a, count in counts.items() if count == max(counts.values())]) == truth


@pytest.mark.parametrize("answers", ["aabbc", "aabb", "abcd", "bbba", "a-b-", "----", "-a", "ab-ab"])
def test_majority_is_the_expectation_over_random_tie_breaks(answers):
    answers = [None if a == "-" else a for a in answers]
    found = majority_at_k(answers, [a == "a" for a in answers], len(answers))
    drawn = fmean(vote_with_a_random_tie_break(answers, "a", DRAWS) for _ in range(4000))
    assert found == pytest.approx(drawn, abs=0.04)  # five standard errors of a fraction over 4000 draws: at most 0.040


@pytest.mark.parametrize("answers, k", [("aabcb", 3), ("abcba", 2), ("aab-b", 3)])
def test_majority_of_fewer_votes_than_responses_has_no_bias(answers, k):
    answers = [None if a == "-" else a for a in answers]
    correct = {a: a == "a" for a in answers}
    over_orders = fmean(majority_at_k(order, [correct[a] for a in order], k) for order in permutations(answers))
    draws = list(combinations(answers, k))
    over_draws = fmean(majority_at_k(draw, [correct[a] for a in draw], k) for draw in draws)
    assert over_orders == pytest.approx(over_draws)


def test_an_answer_that_is_only_sometimes_correct_counts_with_its_fraction():
    assert majority_at_k(["a", "a", "b"], [True, False, False], 3) == 0.5


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_responses_is_refused(k):
    for estimate in (lambda: pass_at_k([True] * 3, k), lambda: majority_at_k(["a"] * 3, [True] * 3, k)):
        with pytest.raises(ValueError, match=f"k={k}"):
            estimate()


class FakeEngine:
    """Gives each prompt the same four texts; records its requests."""

    def __init__(self):
        self.asked = []

    def generate(self, request):
        prompts, sampling = request.prompts, request.sampling
        if request.stop and request.stop():
            raise RolloutStopped
        self.asked.append((tuple(prompts), sampling))
        texts = [f"\\boxed{{{x}}}" for x in (3, 5, 5)] + ["cut"]
        texts = (texts * sampling.group_size)[: sampling.group_size]
        return [ResponseGroup(prompt, tuple(map(self.respond, texts))) for prompt in prompts]

    @staticmethod
    def respond(text) -> Response:
        cut = text == "cut"
        return Response((1,) * (9 if cut else 5), (0.0,), text, "length" if cut else "stop", 0)


class FakeScorer:
    def score(self, groups, complete):
        pairs = [(response.text, group.prompt.answer) for group in groups for response in group.responses]
        rewards = [
            math_reward(text if whole else "", answer) for (text, answer), whole in zip(pairs, complete, strict=True)
        ]
        return ScoredRewards(torch.tensor(rewards), torch.tensor(rewards) > 0, {})

    def read_metrics(self):
        return {"reward/timeouts": 2.0, "reward/worker_crashes": 0.0}


def make_config(**evaluation) -> Config:
    return Config(
        model={"path": "org/model"},
        data={"source": "builtin:arithmetic", "template": "plain", "max_prompt_tokens": 32},
        trainer={"steps": 5},
        evaluation=dict(responses_per_prompt=4, every_steps=2) | evaluation,
    )


PROMPTS = [Prompt(7, "", (1,), "3"), Prompt(9, "", (1,), "5"), Prompt(11, "", (1,), "8")]


def test_the_metrics_are_those_of_the_known_responses():
    evaluator = Evaluator(make_config(), PROMPTS, FakeScorer())
    found = evaluator.metrics(evaluator.evaluate(FakeEngine(), 0, Endings(())))
    assert found == pytest.approx(
        {
            "evaluation/pass_at_1": (1 / 4 + 2 / 4 + 0) / 3,
            "evaluation/pass_at_4": 2 / 3,
            "evaluation/maj_at_4": 1 / 3,  # 5 wins everywhere
            "evaluation/response_length_mean": 6.0,
            "evaluation/truncated_fraction": 1 / 4,
            "evaluation/unparsed_fraction": 1 / 4,
            "evaluation/repetitive_fraction": 0.0,
            "evaluation/confidently_incorrect_fraction": 0.0,  # half of the responses agree, which is not a majority
            "evaluation/timeouts": 2.0,
        }
    )


def test_further_metrics_are_measured_in_addition():
    evaluator = Evaluator(make_config(metrics=["pass@2", "maj@2"]), PROMPTS, FakeScorer())
    found = evaluator.metrics(evaluator.evaluate(FakeEngine(), 0, Endings(())))
    assert found["evaluation/pass_at_2"] == pytest.approx((1 - 3 / 6 + 1 - 1 / 6 + 0) / 3)  # 1, 2 and 0 of 4 correct
    assert {"evaluation/pass_at_1", "evaluation/pass_at_4", "evaluation/maj_at_4", "evaluation/maj_at_2"} < set(found)


def test_metrics_of_more_responses_than_there_are_cannot_be_measured():
    with pytest.raises(ConfigError, match=r"evaluation\.metrics: pass@5, maj@8 of more .*responses_per_prompt=4"):
        check_config(make_config(metrics="pass@2, pass@5, maj@8"))


def test_every_evaluation_uses_the_same_prompts_and_its_own_seeds_which_training_never_uses():
    evaluator, sampler = Evaluator(make_config(temperature=0.3), PROMPTS, FakeScorer()), FakeEngine()
    for steps_done in range(0, 50):
        evaluator.evaluate(sampler, steps_done, Endings(()))
    assert {prompts for prompts, _ in sampler.asked} == {tuple(PROMPTS)}
    assert {s.temperature for _, s in sampler.asked} == {0.3}

    def seeds(stream, steps):
        return [response_seed(0, stream, step, prompt.id, i) for step in steps for prompt in PROMPTS for i in range(4)]

    assert {s.stream for _, s in sampler.asked} == {"eval"}
    own, training = seeds("eval", (s.step for _, s in sampler.asked)), seeds("train", range(50))
    assert len(set(own)) == len(own) == 50 * 3 * 4 and not set(own) & set(training)


@pytest.mark.parametrize(("stream", "step", "position"), [("train", 0, "0"), ("train", 7, "7"), ("eval", 7, "-8")])
def test_seeds_are_those_of_runs_that_counted_evaluations_as_negative_steps(stream, step, position):
    digest = hashlib.blake2b(f"5/{position}/17/3".encode(), digest_size=8).digest()
    assert response_seed(5, stream, step, 17, 3) == int.from_bytes(digest, "little") >> 1


class Words:
    """Stand-in for a tokenizer: one token per character."""

    chat_template, name_or_path, bos_token_id = None, "words", None

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [list(map(ord, text)) for text in texts]}


def test_evaluation_prompts_are_from_the_test_split_and_equal_for_every_run_seed():
    trained = load_own_set(make_config(split="train"), Words())
    asked = load_own_set(make_config(prompts=20), Words())
    again = load_own_set(make_config(prompts=20).model_copy(update={"run": {"seed": 3}}), Words())
    assert asked == again and len({prompt.id for prompt in asked}) == 20
    assert not {prompt.text for prompt in asked} & {prompt.text for prompt in trained}
    assert len(load_own_set(make_config(), Words())) == 512


def test_too_few_evaluation_prompts_and_unreadable_ones_are_refused_with_their_key(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation\.prompts=513.*only 512"):
        load_own_set(make_config(prompts=513), Words())
    (tmp_path / "a.jsonl").write_text('{"question": "1", "answer": "1"}\n')
    with pytest.raises(DataError, match="evaluation.*no column 'problem'"):
        load_own_set(make_config(source=str(tmp_path / "a.jsonl")), Words())
    assert load_own_set(make_config(source=str(tmp_path / "a.jsonl"), prompt_column="question"), Words())


@pytest.mark.parametrize(
    ("evaluation", "named"),
    [
        ({"split": "train"}, "would use the training problems"),
        ({"source": "builtin:arithmetic", "split": "train"}, "would use the training problems"),
        ({"source": "./nowhere.jsonl"}, r"evaluation\.source=./nowhere\.jsonl: there is no such file"),
    ],
)
def test_a_meaningless_or_impossible_evaluation_is_refused(evaluation, named):
    check_config(make_config(), ranks=1)
    with pytest.raises(ConfigError, match=named):
        check_config(make_config(**evaluation), ranks=1)


def test_a_single_file_has_no_test_split(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("{}")
    config = Config(model={"path": "org/model"}, data={"source": str(file)}, evaluation={})
    with pytest.raises(ConfigError, match="would use the training problems"):
        check_config(config, ranks=1)


@pytest.mark.parametrize("steps, every", [(5, 2), (4, 2), (1, 9)])
def test_the_ledger_counts_the_evaluations_of_a_run(steps, every, run):
    config = make_config(prompts=3, every_steps=every).model_copy(update={"trainer": TrainerConfig(steps=steps)})
    rows = {row.name: row.value for row in batch_ledger(config, 1)}
    assert rows["evaluations in the run"] == str(len(run(0, steps, steps, every_steps=every)))
    assert rows["responses per evaluation"] == "12"


def make_periodic(config: Config, path, steps_done: int) -> PeriodicEvaluation:
    evaluator = Evaluator(config, load_own_set(config, Words()), FakeScorer())
    return PeriodicEvaluation(config, [evaluator], path, steps_done)


@pytest.fixture
def run(tmp_path):
    """Run from one number of completed steps to another; returns the evaluations in between."""

    def steps(first: int, last: int, steps: int = 5, **settings) -> list[int]:
        config = make_config(prompts=3, **settings).model_copy(update={"trainer": TrainerConfig(steps=steps)})
        evaluation, made = make_periodic(config, tmp_path / "evaluation.jsonl", first), []
        for done in range(first, last + 1):
            if evaluation.due(done):
                evaluation.run(FakeEngine(), done, Endings(()))
                made.append(done)
        return made

    return steps


def lines(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def test_a_run_is_evaluated_before_the_first_step_during_training_and_at_the_end(run, tmp_path):
    assert run(0, 5) == [0, 2, 4, 5] == lines(tmp_path)


def test_a_resumed_run_repeats_no_evaluation_of_its_weights(run, tmp_path):
    assert run(0, 2) == [0, 2]
    assert run(2, 5) == [4, 5]
    assert run(5, 5) == []
    assert lines(tmp_path) == [0, 2, 4, 5]


def test_evaluations_after_the_checkpoint_are_repeated_like_their_steps(run, tmp_path):
    run(0, 4)
    assert run(1, 5) == [2, 4, 5]
    assert lines(tmp_path) == [0, 2, 4, 5]


def test_an_interrupted_evaluation_is_repeated_on_resume(run, tmp_path):
    run(0, 2)
    file = tmp_path / "evaluation.jsonl"
    file.write_text(file.read_text()[:-20])
    assert run(2, 2) == [2] and lines(tmp_path) == [0, 2]


def test_a_stopped_evaluation_writes_nothing_and_is_repeated_with_the_same_results(run, tmp_path):
    undisturbed = make_periodic(make_config(prompts=3), tmp_path / "undisturbed.jsonl", 0)
    expected = undisturbed.run(FakeEngine(), 0, Endings(()))
    evaluation = make_periodic(make_config(prompts=3), tmp_path / "evaluation.jsonl", 0)
    with pytest.raises(RolloutStopped):
        evaluation.run(FakeEngine(), 0, Endings(()), stop=lambda: True)
    assert evaluation.due(0) and not (tmp_path / "evaluation.jsonl").exists()
    found = evaluation.run(FakeEngine(), 0, Endings(()), stop=lambda: False)
    assert found | {"time/evaluation_s": 0} == expected | {"time/evaluation_s": 0}
    assert not evaluation.due(0) and lines(tmp_path) == [0]
