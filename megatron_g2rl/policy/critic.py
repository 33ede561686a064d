"""The critic: a second model on Megatron that estimates the return of every token of a response, under the same layout.

It is the model of the run with a value head in place of its LM head, with weights and an optimizer of its own. Packing,
schedule and data parallelism are those of the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_g2rl.config.sections.model import OptimizerConfig
from megatron_g2rl.policy import model, packing
from megatron_g2rl.policy.hf.weights import HFWeights
from megatron_g2rl.policy.models import flops
from megatron_g2rl.policy.optimizer import Optimizer, UpdateResult, gather_parameters, wrap_data_parallel
from megatron_g2rl.policy.packing import PackedBatch, TokenSequence
from megatron_g2rl.policy.policy import Policy
from megatron_g2rl.policy.schedule import run_schedule, update_pass

ValueLoss = Callable[[Float[Tensor, "responses positions"], PackedBatch], tuple[Tensor, dict[str, Tensor]]]
"""(values, batch) -> (this micro-batch's part of the update's loss, additive metrics); rows as in `policy.RowLoss`."""


@dataclass
class ValueRequest:
    """What the schedule passes to the value head and to the loss for one micro-batch."""

    batch: PackedBatch


class ValueHead(nn.Module):
    """Output layer of the critic: one number per token from its hidden state, in float32; complete on every rank.

    It starts at zero, under every layout: the first values are 0, and the first update changes the head only.
    """

    def __init__(self, gpt: GPTModel):
        """Create the head of a model's last stage; its weight has the dtype and device of the model.

        Args:
            gpt: the model that it belongs to.
        """
        super().__init__()
        config, like = gpt.config, next(gpt.parameters())
        self.request: ValueRequest | None = None
        self.sequence_parallel = config.sequence_parallel
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=like.device))
        # Each rank has the gradient of its part of the sequence: Megatron sums those of parameters with this attribute.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """Hidden states [tokens (over TP under sequence parallelism), 1, hidden] -> ([tokens, 1, 1], None)."""
        values = F.linear(input_.float(), self.weight.float())
        if self.sequence_parallel:
            # The loss is the same on all ranks: each one takes its part of the gradient.
            group = parallel_state.get_tensor_model_parallel_group()
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False, group=group)
        return values, None


def replace_head(gpt: GPTModel) -> None:
    """Replace the LM head of a model chunk, if it has one, by a value head; tied embeddings are no longer tied."""
    gpt.share_embeddings_and_output_weights = False
    if gpt.post_process:
        gpt.output_layer = ValueHead(gpt)


class Critic:
    """The value model with its optimizer; every method is a collective over all ranks."""

    def __init__(self, policy: Policy, optimizer: OptimizerConfig, total_updates: int):
        """Build the model with the weights of `policy.model_path`, and create the optimizer.

        Args:
            policy: determines model and layout; its own weights are not used.
            optimizer: Adam and its schedule.
            total_updates: number of updates of the critic in the run; the length of the schedule.
        """
        self.policy, self.settings = policy, policy.settings
        config = model.transformer_config(policy.architecture, policy.settings, policy.runtime.device)
        chunks = model.build_chunks(policy.architecture, config, policy.settings, policy.runtime)
        HFWeights(chunks, policy.architecture).load(policy.model_path)
        for chunk in chunks:
            replace_head(model.unwrap(chunk))
        self.chunks = wrap_data_parallel(chunks, config, policy.settings)
        self.optimizer = Optimizer(self.chunks, config, policy.settings, optimizer, total_updates)

    def values(self, sequences: Sequence[TokenSequence]) -> tuple[Float[Tensor, "_tokens"], ...]:
        """Value of the state before every response token, per response; on the host, the same on every rank.

        Args:
            sequences: prompts with their responses, the same list on every rank.
        """
        batches = self.policy.microbatches(sequences)
        self.policy.flops += flops.forward_flops(self.policy.architecture, sequences, lm_head=False)
        for chunk in self.chunks:
            chunk.eval()

        def read(request: ValueRequest):
            return lambda output, non_loss_data=True: output.squeeze(0).clone()

        with torch.no_grad():
            outputs = run_schedule(self.chunks, batches, ValueRequest, read, forward_only=True)
        for chunk in self.chunks:
            chunk.train()
        columns = list(zip(batches, outputs, strict=True)) if outputs else []
        return self.policy.gather_tokens(sequences, columns, 1)[0]

    def update(self, sequences: Sequence[TokenSequence], loss: ValueLoss) -> tuple[UpdateResult, dict[str, float]]:
        """One optimizer update on `sequences`.

        Args:
            sequences: the responses of the update, the same list on every rank.
            loss: called once per micro-batch on the last stage; its parts add up to the update's loss.

        Returns:
            The optimizer's result, and the sums of the metrics over micro-batches and ranks, including `loss`.
        """
        metrics = self.accumulate_gradients(sequences, loss)
        return self.optimizer.apply(metrics["loss"]), metrics

    def accumulate_gradients(self, sequences: Sequence[TokenSequence], loss: ValueLoss) -> dict[str, float]:
        """Forward and backward of `update` without the optimizer; gradients stay in the chunks' buffers."""

        def packed_loss(values: Tensor, request: ValueRequest):
            return loss(packing.to_rows(values.squeeze(1), request.batch), request.batch)

        self.optimizer.zero_gradients()
        self.policy.flops += flops.UPDATE * flops.forward_flops(self.policy.architecture, sequences, lm_head=False)
        batches = self.policy.microbatches(sequences)
        return self.policy.sum_metrics(update_pass(self.chunks, batches, ValueRequest, packed_loss))

    def gather_parameters(self) -> None:
        """As `Policy.gather_parameters`."""
        gather_parameters(self.chunks, self.settings)

    def rest(self) -> None:
        """Free memory that only updates need; the next update allocates it again. Not a collective."""
        self.optimizer.rest()
