"""Runs micro-batches through the model with Megatron's schedules: the old-log-prob pass and the update pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_g2rl.policy.head import TokenScores
from megatron_g2rl.policy.model import HeadRequest, packed_parameters, unwrap
from megatron_g2rl.policy.packing import PackedBatch

Request = Any
"""What the output layer of the last stage gets for a micro-batch as `request`: a `HeadRequest`, or that of a critic."""

Loss = Callable[[Tensor, Request], tuple[Tensor, dict[str, Tensor]]]
"""(values [tokens, columns], request) -> (loss, metrics): a micro-batch's part of the update's loss.

The values are those of the output layer: log-prob and entropy of the LM head, or one value. The request is that after
the forward: `request.batch` is the micro-batch, `request.phi` of a `HeadRequest` is Φ if it was requested.
"""


def forward_pass(
    chunks: Sequence[nn.Module], batches: Sequence[PackedBatch], make_request: Callable[[PackedBatch], HeadRequest]
) -> list[TokenScores]:
    """Forward all micro-batches without gradients.

    Args:
        chunks: this rank's model chunks.
        batches: this data-parallel rank's micro-batches, the same on all its pipeline stages.
        make_request: creates the head's request for a micro-batch.

    Returns:
        Scores of each micro-batch in order, on the last pipeline stage; empty on other stages.
    """

    def collect(request: HeadRequest):
        return lambda output, non_loss_data=True: request.scores

    with torch.no_grad():
        return run_schedule(chunks, batches, make_request, collect, forward_only=True)


def update_pass(
    chunks: Sequence[nn.Module],
    batches: Sequence[PackedBatch],
    make_request: Callable[[PackedBatch], Request],
    loss: Loss,
) -> list[dict[str, Tensor]]:
    """Forward and backward of all micro-batches; gradients are summed over them and over data-parallel ranks.

    Args:
        chunks, batches, make_request: as in `forward_pass`.
        loss: this micro-batch's part of the loss; parts of all micro-batches and ranks add up to the update's loss.

    Returns:
        Metrics of each micro-batch, including `loss`, on the last pipeline stage; empty on other stages.
    """

    def backward_from(request: Request):
        def evaluate(output: Tensor):
            value, metrics = loss(output.squeeze(0), request)
            # The third value is what the schedule stores; it must not share memory with the loss.
            metrics = {name: metric.detach().clone() for name, metric in metrics.items()}
            return value, value.new_zeros((), dtype=torch.int), metrics | {"loss": value.detach().clone()}

        return evaluate

    return run_schedule(chunks, batches, make_request, backward_from, forward_only=False)


def run_schedule(
    chunks: Sequence[nn.Module],
    batches: Sequence[PackedBatch],
    make_request: Callable[[PackedBatch], Request | None],
    reader: Callable[[Request | None], Callable],
    *,
    forward_only: bool,
) -> list:
    """Run the micro-batches through Megatron's schedule for this layout.

    Args:
        chunks, batches: as in `forward_pass`.
        make_request: creates the request for a micro-batch; None: an LM head returns logits.
        reader: creates megatron's loss function for a micro-batch from its request.
        forward_only: no backward; the loss function is called with `non_loss_data=True`.

    Returns:
        The loss functions' values to store, on the last stage; empty on other stages.
    """

    def forward_step(iterator, model):
        batch = next(iterator)
        request = make_request(batch)
        gpt = unwrap(model)
        if gpt.post_process:
            gpt.output_layer.request = request
        packed = packed_parameters(gpt, batch)
        output = model(batch.tokens[None], batch.positions[None], None, packed_seq_params=packed)
        return output, reader(request)

    iterators = [iter(batches) for _ in chunks]
    length = batches[0].bounds[-1]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
