"""Packed micro-batches: the shift, the padding and the split over context-parallel ranks."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from megatron_g2rl.data.batching import plan_microbatches
from megatron_g2rl.policy.packing import (
    LENGTH_STEPS,
    TOKEN_STEPS,
    TokenSequence,
    alignment,
    chosen_values,
    coarse,
    pack,
    row_mask,
    to_rows,
)

SEQUENCES = [TokenSequence((11, 12, 13), (21, 22)), TokenSequence((14,), (23,)), TokenSequence((15, 16), ())]


def test_the_last_prompt_token_predicts_the_first_response_token():
    batch = pack(SEQUENCES, [0, 1, 2])
    assert batch.tokens.tolist() == [11, 12, 13, 21, 14, 15, 16]
    assert batch.targets.tolist() == [0, 0, 21, 22, 23, 0, 0]
    assert batch.row.tolist() == [-1, -1, 0, 0, 1, -1, -1]
    assert batch.offset.tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 7] and batch.max_seqlen == 4


def test_padding_is_a_separate_sequence_and_predicts_nothing():
    batch = pack(SEQUENCES, [0, 1], total=9)
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 9]
    assert (batch.row[5:] == -1).all() and batch.response_tokens == (2, 1)
    with pytest.raises(ValueError, match="5 tokens"):
        pack(SEQUENCES, [0, 1], total=4)


def test_a_microbatch_may_be_empty():
    batch = pack(SEQUENCES, [], sequence_multiple=4, batch_multiple=8)
    assert len(batch.tokens) == 8 and row_mask(batch).shape == (0, 0)


def test_rows_hold_the_values_of_each_response_and_pass_gradients_back():
    batch = pack(SEQUENCES, [1, 0, 2])
    values = torch.arange(7.0, requires_grad=True)
    rows = to_rows(values, batch)
    assert rows.tolist() == [[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]
    assert row_mask(batch).tolist() == [[1, 0], [1, 1], [0, 0]]
    rows.sum().backward()
    assert values.grad.tolist() == [1, 0, 0, 1, 1, 0, 0]


def test_numbers_of_response_tokens_are_in_the_order_of_the_chosen_positions():
    batch = pack(SEQUENCES, [1, 2, 0], total=9)
    values = [(0.5, -1.5), (-2.5,), ()]
    assert chosen_values(values, batch).tolist() == [-2.5, 0.5, -1.5]
    parts = [pack(SEQUENCES, [0, 1], sequence_multiple=4, context_size=2, context_rank=r) for r in range(2)]
    found = {}
    for part in parts:
        for target, value in zip(part.targets[part.chosen].tolist(), chosen_values(values, part).tolist(), strict=True):
            found[target] = value
    assert found == {21: 0.5, 22: -1.5, 23: -2.5}
    assert chosen_values(values, pack(SEQUENCES, [])).shape == (0,)


@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_parts_form_the_complete_batch(size):
    each, whole = alignment(tensor_size=2, context_size=size, sequence_parallel=True)
    sequences = [TokenSequence(tuple(range(1, 8)), tuple(range(30, 39))), TokenSequence((9,), (40, 41, 42))]
    shares = [
        pack(sequences, [0, 1], sequence_multiple=each, batch_multiple=whole, context_rank=r, context_size=size)
        for r in range(size)
    ]
    full = pack(sequences, [0, 1], sequence_multiple=each, batch_multiple=whole)
    assert len({len(s.tokens) for s in shares}) == 1 and len(shares[0].tokens) % 2 == 0
    for name in ("tokens", "targets", "positions"):
        together = torch.cat([getattr(s, name) for s in shares])
        assert sorted(together.tolist()) == sorted(getattr(full, name).tolist())
    summed = sum(to_rows(s.targets.float(), s) for s in shares)
    assert torch.equal(summed, to_rows(full.targets.float(), full))


def test_a_response_needs_a_prompt():
    with pytest.raises(ValueError, match="prompt token"):
        TokenSequence((), (1,))


def test_host_side_lengths_equal_those_in_the_tensors():
    batch = pack(SEQUENCES, [1, 0, 2])
    assert batch.chosen.tolist() == (batch.row >= 0).nonzero().squeeze(1).tolist()
    assert batch.runs == ((0, 1), (1, 2)) and batch.bounds == tuple(batch.cu_seqlens.tolist())
    values = torch.arange(7.0)
    rows = to_rows(values, batch)
    chosen = batch.row >= 0
    assert rows[batch.row[chosen], batch.offset[chosen]].tolist() == values[chosen].tolist()


@pytest.mark.parametrize(("each", "whole"), [(1, 1), (4, 8), (8, 24)])
def test_padding_to_few_shapes_changes_no_token(each, whole):
    exact = pack(SEQUENCES, [0, 1, 2], sequence_multiple=each, batch_multiple=whole)
    batch = pack(SEQUENCES, [0, 1, 2], sequence_multiple=each, batch_multiple=whole, few_shapes=True)
    used = len(exact.tokens)
    for name in ("tokens", "targets", "row", "offset"):
        assert torch.equal(getattr(batch, name)[:used], getattr(exact, name)), name
    assert len(batch.tokens) % whole == 0 and batch.max_seqlen >= exact.max_seqlen
    assert batch.bounds[-1] == len(batch.tokens) and (len(batch.bounds) - 1).bit_count() == 1
    assert all(b - a <= batch.max_seqlen for a, b in itertools.pairwise(batch.bounds))


def test_a_context_parallel_part_padded_to_few_shapes_is_complete():
    shares = [
        pack(SEQUENCES, [0, 1], sequence_multiple=4, batch_multiple=4, context_rank=r, context_size=2, few_shapes=True)
        for r in (0, 1)
    ]
    full = pack(SEQUENCES, [0, 1], sequence_multiple=4, batch_multiple=4, few_shapes=True)
    together = torch.cat([s.tokens for s in shares])
    assert sorted(together.tolist()) == sorted(full.tokens.tolist())


def test_a_run_has_few_shapes():
    """cuDNN builds a graph per (sequences, power of two of tokens, longest): a simulated run of 200 updates."""
    draw, shapes, exact = random.Random(0), set(), set()
    for _ in range(200):
        lengths = [min(16_000, int(draw.lognormvariate(7.5, 0.9)) + 100) for _ in range(256)]
        for rank in plan_microbatches(lengths, data_parallel=8, tokens_per_microbatch=32_768):
            for members in rank:
                used = sum(lengths[i] for i in members)
                longest, count = max(lengths[i] for i in members), len(members)
                exact.add((count, used, longest))
                tokens = coarse(used, TOKEN_STEPS)
                count += tokens > used
                shapes.add((1 << (count - 1).bit_length(), tokens.bit_length(), coarse(longest, LENGTH_STEPS)))
                assert tokens <= max(128, 17 / 16 * used)
    assert len(exact) > 1_000 and len(shapes) < 64
