"""No split of an update changes its loss, gradient or metrics: micro-batches, ranks, tokens of a response."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from loss_keywords import training_loss
from torch import Tensor

from megatron_g2rl.algorithm import AGGREGATIONS, UpdateTotals, rollout_mismatch, supervised_loss

RESPONSES, TOKENS = 9, 12
# the same float64 terms in a different summation order
SUMMED = {"rtol": 1e-12, "atol": 1e-14}


def update(seed: int) -> dict[str, Tensor]:
    """A complete update; some responses are empty, some fill the row."""
    draw = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(RESPONSES, TOKENS, dtype=torch.float64, generator=draw)

    lengths = torch.randint(0, TOKENS + 1, (RESPONSES,), generator=draw)
    old = -normal().abs()
    return {
        "logprobs": old + 0.6 * normal(),
        "old_logprobs": old,
        "advantages": torch.randn(RESPONSES, dtype=torch.float64, generator=draw),
        "mask": torch.arange(TOKENS)[None] < lengths[:, None],
        "reference_logprobs": old + 0.3 * normal(),
        "entropy": normal().abs(),
        "importance_weights": normal().exp().clamp(max=2),
    }


def summed(parts: Iterable[dict[str, Tensor]], leaves: dict[str, Tensor], **options) -> list[Tensor]:
    """Loss, gradients and metrics, summed over the parts of an update."""
    losses, metrics = [], []
    for part in parts:
        loss, own = training_loss(**part, kl_coefficient=0.1, entropy_coefficient=0.05, **options)
        loss.backward()
        losses.append(loss.detach())
        metrics.append(torch.stack([own[name] for name in sorted(own)]))
    return [torch.stack(losses).sum(), torch.stack(metrics).sum(0), *(leaf.grad for leaf in leaves.values())]


def with_leaves(whole: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    leaves = {name: whole[name].clone().requires_grad_() for name in ("logprobs", "entropy")}
    return {**whole, **leaves}, leaves


def close(one: list[Tensor], other: list[Tensor]) -> None:
    for expected, got in zip(one, other, strict=True):
        torch.testing.assert_close(got, expected, **SUMMED)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("seed", range(4))
def test_micro_batches_of_any_size_sum_to_the_update(aggregation, ratio, seed):
    options = {"aggregation": aggregation, "ratio": ratio}
    whole = update(seed)
    inputs, leaves = with_leaves(whole)
    expected = summed([inputs], leaves, **options)
    inputs, leaves = with_leaves(whole)
    # a permutation split into parts of random sizes, including empty ones, as for ranks and micro-batches
    draw = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, RESPONSES + 1, (4,), generator=draw).sort().values.tolist()
    rows = torch.randperm(RESPONSES, generator=draw).tensor_split(cuts)
    parts = ({name: value[own] for name, value in inputs.items()} for own in rows)
    close(expected, summed(parts, leaves, totals=UpdateTotals.of(whole["mask"]), **options))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_of_a_response_may_be_on_several_ranks(aggregation, seed):
    whole = update(seed)
    inputs, leaves = with_leaves(whole)
    expected = summed([inputs], leaves, aggregation=aggregation)
    inputs, leaves = with_leaves(whole)
    owner = torch.randint(0, 3, (RESPONSES, TOKENS), generator=torch.Generator().manual_seed(seed))
    parts = ({**inputs, "mask": inputs["mask"] & (owner == rank)} for rank in range(3))
    lengths = whole["mask"].sum(1)
    got = summed(parts, leaves, aggregation=aggregation, totals=UpdateTotals.of(whole["mask"]), response_tokens=lengths)
    close(expected, got)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_padding_an_update_changes_nothing(aggregation):
    whole = update(1)
    inputs, leaves = with_leaves(whole)
    expected = summed([inputs], leaves, aggregation=aggregation)
    padded = {
        name: torch.nn.functional.pad(value, (0, 3, 0, 2) if value.ndim == 2 else (0, 2))
        for name, value in whole.items()
    }
    inputs, leaves = with_leaves(padded)
    loss, metrics, *gradients = summed([inputs], leaves, aggregation=aggregation)
    close(expected, [loss, metrics, *(gradient[:RESPONSES, :TOKENS] for gradient in gradients)])


def test_totals_count_tokens_and_non_empty_responses():
    mask = torch.tensor([[True, True, False], [False, False, False], [False, True, False]])
    assert UpdateTotals.of(mask) == UpdateTotals(tokens=3, responses=2)
    # local tokens of longer responses
    assert UpdateTotals.of(mask, torch.tensor([4, 5, 0])) == UpdateTotals(tokens=9, responses=2)


def test_the_sft_loss_sums_over_micro_batches():
    whole = update(2)
    totals = UpdateTotals.of(whole["mask"])
    expected, _ = supervised_loss(whole["logprobs"], whole["mask"])
    parts = [supervised_loss(whole["logprobs"][i : i + 4], whole["mask"][i : i + 4], totals=totals) for i in (0, 4, 8)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), expected, **SUMMED)


def test_mismatch_metrics_sum_over_ranks_and_the_maximum_is_their_maximum():
    whole = update(3)
    names = ("old_logprobs", "reference_logprobs", "mask")
    expected = rollout_mismatch(*(whole[name] for name in names), cap=1.2)
    totals = UpdateTotals.of(whole["mask"])
    parts = [rollout_mismatch(*(whole[name][i : i + 5] for name in names), cap=1.2, totals=totals) for i in (0, 5)]
    for name, value in expected.items():
        own = torch.stack([part[name] for part in parts])
        torch.testing.assert_close(own.max() if name.endswith("max") else own.sum(), value, **SUMMED)
