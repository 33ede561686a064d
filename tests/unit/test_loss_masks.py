"""Aggregation of token values, which values outside the response mask do not affect."""

from __future__ import annotations

import math

import pytest
import torch
from loss_keywords import training_loss
from torch import Tensor

from megatron_g2rl.algorithm import AGGREGATIONS, aggregate, policy_loss


def double(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(seed: int = 0, responses: int = 5, tokens: int = 6) -> dict[str, Tensor]:
    """Random float64 inputs; responses of several lengths, the second one empty."""
    draw = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(responses, tokens, dtype=torch.float64, generator=draw)

    lengths = torch.randint(1, tokens + 1, (responses,), generator=draw)
    lengths[1] = 0
    old = -normal().abs()
    return {
        "logprobs": old + 0.5 * normal(),
        "old_logprobs": old,
        "advantages": torch.randn(responses, dtype=torch.float64, generator=draw),
        "mask": torch.arange(tokens)[None] < lengths[:, None],
        "reference_logprobs": old + 0.3 * normal(),
        "entropy": normal().abs(),
        "importance_weights": normal().exp().clamp(max=2),
    }


@pytest.mark.parametrize(
    "aggregation, expected",
    [("token_mean", 15 / 5), ("sequence_mean", (1.5 + 4) / 2), ("sequence_mean_token_sum", (3 + 12) / 2)],
)
def test_aggregation_of_a_worked_example(aggregation, expected):
    # values 1, 2 | 3, 4, 5; a third response without a token never counts
    values = double([1, 2, math.inf], [3, 4, 5], [math.nan] * 3)
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    assert aggregate(values, mask, aggregation).item() == pytest.approx(expected, abs=1e-14)


def test_token_mean_is_the_default():
    inputs = {name: batch()[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")}
    assert policy_loss(**inputs)[0] == policy_loss(**inputs, aggregation="token_mean")[0]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (3, 4)])
def test_an_update_without_tokens_is_zero_and_connected(aggregation, ratio, shape):
    garbage = torch.full(shape, torch.nan)
    logprobs = garbage.clone().requires_grad_()
    mask = torch.zeros(shape, dtype=torch.bool)
    loss, metrics = training_loss(
        logprobs,
        garbage,
        torch.full(shape[:1], torch.nan),
        mask,
        entropy=garbage,
        reference_logprobs=garbage,
        kl_coefficient=0.1,
        entropy_coefficient=0.1,
        aggregation=aggregation,
        ratio=ratio,
        importance_weights=garbage,
    )
    loss.backward()
    assert loss == 0 and torch.equal(logprobs.grad, torch.zeros(shape))
    assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("per_token", [False, True])
def test_masked_values_change_nothing(aggregation, ratio, garbage, per_token):
    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        logprobs, entropy = inputs["logprobs"].clone().requires_grad_(), inputs["entropy"].clone().requires_grad_()
        options = {"kl_coefficient": 0.1, "entropy_coefficient": 0.2, "aggregation": aggregation, "ratio": ratio}
        loss, metrics = training_loss(**{**inputs, "logprobs": logprobs, "entropy": entropy}, **options)
        loss.backward()
        return loss.detach(), logprobs.grad, entropy.grad, metrics

    clean, dirty = batch(), batch()
    for name in ("logprobs", "old_logprobs", "reference_logprobs", "entropy", "importance_weights"):
        dirty[name][~dirty["mask"]] = garbage
    dirty["advantages"][1] = garbage  # the response without a token
    if per_token:
        dirty["advantages"] = dirty["advantages"][:, None].where(dirty["mask"], garbage)
    for expected, got in zip(run(clean)[:3], run(dirty)[:3], strict=True):
        assert torch.equal(expected, got)
    assert run(clean)[3] == run(dirty)[3]
    assert not run(dirty)[1][~dirty["mask"]].any()
