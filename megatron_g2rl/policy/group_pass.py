"""The update pass whose micro-batches hold complete groups: its forward yields Φ before its backward begins.

A loss that depends on Φ of all responses of a group, as that of G2RL does, then needs no old-log-prob pass
(docs/method.md, section 8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_g2rl.data.batching import largest_group
from megatron_g2rl.policy import packing
from megatron_g2rl.policy.head import DeviceTimer
from megatron_g2rl.policy.model import HeadRequest
from megatron_g2rl.policy.models import flops
from megatron_g2rl.policy.packing import PackedBatch, TokenSequence
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.policy.schedule import update_pass
from megatron_g2rl.policy.topk_features import seconds_on_ranks
from megatron_g2rl.records import ScoredBatch

LossWithFeatures = Callable[
    [
        Float[Tensor, "responses positions"],
        Float[Tensor, "responses positions"],
        Float[Tensor, "responses hidden"],
        PackedBatch,
    ],
    tuple[Tensor, dict[str, Tensor]],
]
"""(log-probs, entropy, Φ, batch) -> (this micro-batch's part of the update's loss, additive metrics).

As `policy.RowLoss`, with Φ of the rows, on the device. The rows are complete groups, in the order of the update.
"""


def groups_fit(policy: Policy, sequences: Sequence[TokenSequence], group_sizes: Sequence[int]) -> bool:
    """Whether every group fits into one micro-batch; the same on every rank, without communication.

    Args:
        policy: its layout determines the padding.
        sequences: all responses, group after group.
        group_sizes: responses of each group.
    """
    r = policy.runtime
    multiple, _ = packing.alignment(r.tensor_size, r.context_size, policy.settings.sequence_parallel)
    return largest_group([s.length for s in sequences], group_sizes, multiple) <= policy.tokens_per_microbatch


def accumulate_groups(
    policy: Policy,
    sequences: Sequence[TokenSequence],
    group_sizes: Sequence[int],
    loss: LossWithFeatures,
    *,
    prior_logprobs: Sequence[Sequence[float]] | None = None,
    prior_tolerance: float = 0.0,
) -> tuple[dict[str, float], ScoredBatch]:
    """Forward and backward of one update, without the optimizer: apply it with `policy.optimizer.apply`.

    A collective over all ranks.

    Args:
        policy: the weights that generated the responses.
        sequences: all responses of the update, group after group; the same list on every rank.
        group_sizes: responses of each group; every group fits (`groups_fit`).
        loss: called once per micro-batch on the last stage; its parts add up to the update's loss.
        prior_logprobs, prior_tolerance: as in `Policy.score`, on every device.

    Returns:
        The sums of the metrics over micro-batches and ranks, including `loss`, and what an old-log-prob pass would have
        returned; the same on every rank.
    """
    device = policy.runtime.device
    timer = DeviceTimer(device)
    seen: list[tuple[HeadRequest, Tensor]] = []
    if prior_tolerance == 0:
        prior_logprobs = None

    def make_request(batch: PackedBatch) -> HeadRequest:
        prior = None if prior_logprobs is None else packing.chosen_values(prior_logprobs, batch)
        options = dict(features=True, prior_logprobs=prior, prior_tolerance=prior_tolerance, timer=timer)
        return HeadRequest(batch, policy.temperature, policy.chunk_tokens, with_gradient=True, **options)

    def packed_loss(values: Tensor, request: HeadRequest):
        seen.append((request, values.detach()))
        rows = (packing.to_rows(values[:, i], request.batch) for i in (0, 1))
        return loss(*rows, request.phi, request.batch)

    policy.flops += flops.UPDATE * flops.forward_flops(policy.architecture, sequences)
    policy.optimizer.zero_gradients()
    batches = policy.microbatches(sequences, group_sizes)
    metrics = policy.sum_metrics(update_pass(policy.chunks, batches, make_request, packed_loss))
    with torch.no_grad():
        statistics = policy.gather_statistics(sequences, [(request.batch, values) for request, values in seen])
        features = [(request.batch, request.phi) for request, _ in seen]
        phi = policy.gather_features(len(sequences), features, timer)
    seconds = seconds_on_ranks(timer, device)
    return metrics, ScoredBatch(statistics.logprobs, statistics.entropy, phi, seconds)
