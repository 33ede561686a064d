"""The loss of responses split over context-parallel ranks equals the loss on one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_g2rl.algorithm import AGGREGATIONS, UpdateTotals, importance_weights, policy_loss

RESPONSES, TOKENS = 4, 10


def make_inputs():
    draw = torch.Generator().manual_seed(4)
    old, step, weights = torch.randn(3, RESPONSES, TOKENS, generator=draw, dtype=torch.float64)
    lengths = torch.tensor([10, 3, 0, 7])
    mask = torch.arange(TOKENS)[None] < lengths[:, None]
    return old + 0.2 * step, old, torch.tensor([1.0, -2.0, 0.5, -0.3]).double(), mask, lengths, weights.exp()


def loss_on_ranks(rank: int, world: int, ratio: str, aggregation: str):
    """Value, gradient and metrics of this rank's part: every world-th token of every response."""
    dist.init_process_group("gloo")
    logprobs, old, advantages, mask, lengths, weights = make_inputs()
    totals = UpdateTotals.of(mask)
    mine = slice(rank, None, world)
    local = logprobs[:, mine].clone().requires_grad_()
    loss, metrics = policy_loss(
        local,
        old[:, mine],
        advantages,
        mask[:, mine],
        ratio=ratio,
        aggregation=aggregation,
        importance_weights=weights[:, mine],
        totals=totals,
        response_tokens=lengths,
        cp_group=dist.group.WORLD,
    )
    loss.backward()
    dist.destroy_process_group()
    return loss.item(), local.grad.tolist(), {name: value.item() for name, value in metrics.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio, world", [("sequence", 2), ("sequence", 3), ("token", 2)])
def test_responses_split_over_ranks_have_the_loss_and_gradient_of_one_rank(ranks, ratio, world, aggregation):
    logprobs, old, advantages, mask, _, weights = make_inputs()
    logprobs.requires_grad_()
    expected, expected_metrics = policy_loss(
        logprobs, old, advantages, mask, ratio=ratio, aggregation=aggregation, importance_weights=weights
    )
    expected.backward()
    results = ranks(world, loss_on_ranks, world, ratio, aggregation)
    gradient = torch.zeros_like(logprobs)
    for rank, (_, own, _) in enumerate(results):
        gradient[:, rank::world] = torch.tensor(own, dtype=torch.float64)
    # float64: the same terms in a different summation order
    assert sum(loss for loss, _, _ in results) == pytest.approx(expected.item(), abs=1e-13)
    torch.testing.assert_close(gradient, logprobs.grad, rtol=0, atol=1e-13)
    for name, value in expected_metrics.items():
        assert sum(metrics[name] for _, _, metrics in results) == pytest.approx(value.item(), abs=1e-13), name


def test_a_sequence_ratio_over_ranks_requires_the_full_lengths(unchecked_shapes):
    logprobs, old, advantages, mask, _, _ = make_inputs()
    with pytest.raises(ValueError, match="needs response_tokens"):
        policy_loss(logprobs, old, advantages, mask, ratio="sequence", cp_group=object())


WEIGHTS = dict(cap=1.5, level="sequence", bounds=(0.6, 3.0))


def weights_on_ranks(rank: int, world: int):
    """Importance weights of every world-th token of every response."""
    dist.init_process_group("gloo")
    logprobs, old, _, mask, _, _ = make_inputs()
    mine = slice(rank, None, world)
    found = importance_weights(logprobs[:, mine], old[:, mine], mask[:, mine], cp_group=dist.group.WORLD, **WEIGHTS)
    dist.destroy_process_group()
    return found.tolist()


@pytest.mark.distributed
def test_importance_weights_of_responses_split_over_ranks_are_those_of_one_rank(ranks):
    logprobs, old, _, mask, _, _ = make_inputs()
    expected = importance_weights(logprobs, old, mask, **WEIGHTS)
    assert len(expected[:, 0].unique()) > 2  # a weight that is neither 0, nor 1, nor the cap
    for rank, weights in enumerate(ranks(2, weights_on_ranks, 2)):
        torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), expected[:, rank::2], rtol=1e-13, atol=0)
