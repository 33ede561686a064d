"""Final answers are partitioned by the verifier, group by group."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_g2rl.records import Prompt, Response, ResponseGroup
from megatron_g2rl.rewards.classes import MOST_DISTINCT, AnswerClasses


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('store')}/s", rank=0, world_size=1)
    made = AnswerClasses(1, 5.0)
    yield made
    made.close()
    dist.destroy_process_group()


def group(*texts: str) -> ResponseGroup:
    return ResponseGroup(Prompt(0, "", (1,), "1"), tuple(Response((1,), (0.0,), text, "stop", 0) for text in texts))


def test_equal_answers_are_one_class_whatever_their_form(classes):
    found = classes.of(
        [
            group("\\boxed{1/2}", "so \\boxed{0.5}", "\\boxed{\\frac{2}{4}}", "\\boxed{2}", "no answer", "\\boxed{3"),
            group("\\boxed{2}", "\\boxed{x+1}", "\\boxed{1+x}"),
        ]
    ).tolist()
    assert found[:6] == [1, 1, 1, 2, 0, 0]
    assert found[6:] == [1, 2, 2]


def test_a_class_is_transitive_and_named_after_its_first_member(classes):
    assert classes.of([group("\\boxed{0.25}", "\\boxed{7}", "\\boxed{1/4}", "\\boxed{25\\%}")]).tolist() == [1, 2, 1, 1]


def test_an_answer_whose_comparison_never_ends_is_in_its_own_class(classes):
    hard = "\\boxed{9^{9^{9^{9}}}}"
    assert classes.of([group(hard, "\\boxed{1}", hard)]).tolist() == [1, 2, 1]


def test_very_many_distinct_answers_are_not_all_compared(classes):
    numbers = [f"\\boxed{{{n}}}" for n in range(MOST_DISTINCT + 6)]
    assert len(set(classes.of([group(*numbers)]).tolist())) == MOST_DISTINCT + 6


def test_no_responses_have_no_classes(classes):
    assert classes.of([]).tolist() == []


def test_an_answer_that_equals_two_classes_belongs_to_the_first(classes, monkeypatch):
    # a comparison with a tolerance is not transitive: c equals a and b, which differ
    equal = {("a", "c"), ("b", "c")}
    monkeypatch.setattr(classes, "_equal", lambda pairs: [pair in equal for pair in pairs])
    assert classes.of([group("\\boxed{a}", "\\boxed{b}", "\\boxed{c}")]).tolist() == [1, 2, 1]
