"""What reward functions may return: numbers of any type, pairs, mappings with forms, and batches of them."""

from __future__ import annotations

from collections import namedtuple
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_g2rl.rewards.contract import ContractError, read_form, read_result, split_batch

Pair = namedtuple("Pair", "reward correct")


@pytest.mark.parametrize(
    ("value", "reward", "correct"),
    [
        (True, 1.0, None),
        (-1, -1.0, None),
        (0.5, 0.5, None),
        (np.float32(0.5), 0.5, None),
        (np.float16(0.5), 0.5, None),
        (np.int64(1), 1.0, None),
        (np.bool_(True), 1.0, None),
        (np.array(0.25), 0.25, None),
        (torch.tensor(0.25), 0.25, None),
        (torch.tensor(0.25, dtype=torch.bfloat16), 0.25, None),
        (torch.tensor(True), 1.0, None),
        (Fraction(1, 4), 0.25, None),
        (Decimal("-0.25"), -0.25, None),
        ((0.1, False), 0.1, False),
        ((Fraction(1, 2), np.bool_(True)), 0.5, True),
        ([-0.5, 1], -0.5, True),
        ((torch.tensor(1.0), torch.tensor(False)), 1.0, False),
        (Pair(0.5, True), 0.5, True),
        ((0.5, None), 0.5, None),
        ({"score": 1.0, "acc": True, "pred": "42"}, 1.0, True),
        ({"reward": 0.5}, 0.5, None),
    ],
)
def test_a_number_of_any_type_is_a_reward_and_a_pair_adds_correctness(value, reward, correct):
    assert read_result(value) == (reward, correct)


@pytest.mark.parametrize(
    "value",
    ["good", "1.0", None, b"1", 1j, float("nan"), float("inf"), Decimal("NaN"), Decimal("sNaN"), 10**400, -1.5]
    + [np.array([1.0]), torch.ones(1), torch.tensor(torch.nan), (1.0,), (1.0, True, 3), (0.5, "yes"), (0.5, 2), {}]
    + [{"acc": True}, ("x", True), object()],
)
def test_an_invalid_result_is_reported(value):
    with pytest.raises(ContractError, match="it returned|its result cannot be read as a number"):
        read_result(value)


def test_a_reward_outside_the_unit_range_is_allowed_only_for_weighted_functions():
    assert read_result(7.5, bounded=False) == (7.5, None)
    for value in (torch.inf, "x"):
        with pytest.raises(ContractError, match="finite number"):
            read_result(value, bounded=False)


@pytest.mark.parametrize(
    "value, form",
    [
        (1.0, None),
        ((1.0, True), None),
        ({"reward": 1}, None),
        ({"score": 1, "form": "a+b"}, "a+b"),
        ({"form": None}, ""),
    ],
)
def test_a_mapping_may_have_a_canonical_form(value, form):
    assert read_form(value) == form


def test_a_form_that_is_no_text_is_refused():
    with pytest.raises(ContractError, match="the form of a response is a text"):
        read_form({"reward": 1, "form": 3})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([0.1, 0.2], [0.1, 0.2]),
        ((0.1, 0.2), [0.1, 0.2]),
        (np.array([0.1, 0.2]), [0.1, 0.2]),
        (torch.tensor([1.0, 0.5]), [1.0, 0.5]),
        ([(0.1, True), 0.2], [(0.1, True), 0.2]),
        (([0.1, 0.2], [True, False]), [(0.1, True), (0.2, False)]),
        (([0.1, 0.2], np.array([True, False])), [(0.1, True), (0.2, False)]),
        (((0.1, True), (0.2, False)), [(0.1, True), (0.2, False)]),
    ],
)
def test_batch_results_are_a_list_an_array_or_a_pair_of_them(value, expected):
    assert [read_result(one) for one in split_batch(value, 2)] == [read_result(one) for one in expected]


@pytest.mark.parametrize(
    ("value", "message"),
    [([0.1], "1 results for a batch of 2"), (torch.ones(3), "3 results"), (0.5, "a float for a batch of 2"),
     (None, "a NoneType"), ("ab", "a str"), ({"rewards": [1, 2]}, "a dict"), (([0.1], [True]), "1 results")],
)  # fmt: skip
def test_batch_results_of_another_type_or_length_are_reported(value, message):
    with pytest.raises(ContractError, match=message):
        split_batch(value, 2)
