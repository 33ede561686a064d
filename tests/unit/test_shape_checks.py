"""The annotations of shapes are checked in these tests: a wrong size, dtype or type is an error."""

from __future__ import annotations

import jaxtyping
import pytest
import shape_checks
import torch

from megatron_g2rl.algorithm import LossInputs, group_advantages
from megatron_g2rl.policy.head import token_logprobs
from megatron_g2rl.policy.packing import TokenSequence, pack, row_mask, rows_of
from megatron_g2rl.records import TokenStatistics

WEIGHT = torch.zeros(7, 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda: group_advantages(torch.zeros(3), torch.zeros(2, dtype=torch.long)),
        lambda: group_advantages(torch.zeros(3), torch.zeros(3)),
        lambda: LossInputs(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3)),
        lambda: token_logprobs(torch.zeros(3, 4), WEIGHT, torch.zeros(2, dtype=torch.long), temperature=1.0),
        lambda: TokenStatistics((None,), (None,)),
        lambda: rows_of([torch.zeros(2, 1)], pack([TokenSequence((1,), (2, 3))], [0]), torch.ones(1, 2).bool()),
    ],
    ids=["size", "dtype", "mask", "head", "hole", "packing"],
)
def test_a_call_that_contradicts_its_annotations_is_an_error(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_responses_of_different_lengths_and_whole_numbers_for_fractions_are_accepted():
    TokenStatistics((torch.zeros(3), torch.zeros(5)), (torch.zeros(3), torch.zeros(5)))
    batch = pack([TokenSequence((1,), (2, 3)), TokenSequence((1, 4), (5,))], [0, 1])
    assert rows_of([torch.ones(2), torch.ones(1)], batch, row_mask(batch)).tolist() == [[1, 1], [1, 0]]
    token_logprobs(torch.zeros(1, 4), WEIGHT, torch.zeros(1, dtype=torch.long), temperature=1)


def test_nothing_is_checked_where_the_code_itself_refuses():
    with shape_checks.disabled(), pytest.raises(ValueError, match="must both be"):
        group_advantages(torch.zeros(3), torch.zeros(2, dtype=torch.long))
