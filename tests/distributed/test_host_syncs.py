"""A micro-batch makes the host wait for the device nowhere: not in the layers, the head or the loss, in both passes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from layout_cases import sequences

LAYOUTS = {
    "one": (1, dict()),
    "tp2_sp": (2, dict(tensor_parallel=2, sequence_parallel=True)),
    "cp2": (2, dict(context_parallel=2)),
    "pp2": (2, dict(pipeline_parallel=2)),
    "recompute": (1, dict(recompute="full")),
}


def watched(rank: int, folder: str, layout: dict, precision: str) -> dict[str, torch.Tensor]:
    """Log-probs and Φ of a pass over micro-batches, and the loss of an update, all under the watch."""
    import gpu_branches
    from megatron.core.tensor_parallel import random
    from small_policy import make_policy

    from megatron_g2rl.algorithm import Totals, training_loss
    from megatron_g2rl.experience import boolean_row_mask
    from megatron_g2rl.policy import packing
    from megatron_g2rl.policy.model import HeadTask
    from megatron_g2rl.policy.schedule import score_pass, update_pass

    with pytest.MonkeyPatch.context() as patch:
        policy = make_policy(folder, layout | dict(precision=precision))
        gpu_branches.take(patch)
        # It compares states of the CPU's generator, on the host also where there is a GPU.
        patch.setattr(random.CudaRNGStatesTracker, "fork", lambda self, *args: contextlib.nullcontext())
        batch = sequences(policy.architecture.vocab_size)
        microbatches = policy.microbatches(batch)
        totals = Totals(tokens=sum(len(s.response) for s in batch), responses=len(batch))
        masks = {id(b): boolean_row_mask(b) for b in microbatches}
        lengths = {id(b): torch.tensor(b.response_tokens) for b in microbatches}

        def loss(values, b):
            logprobs, entropy = (packing.to_rows(values[:, i], b) for i in (0, 1))
            return training_loss(
                logprobs,
                logprobs.detach(),
                torch.ones(len(b.sources)),
                masks[id(b)],
                entropy=entropy,
                entropy_coefficient=0.1,
                totals=totals,
                response_tokens=lengths[id(b)],
                group=policy.context_group,
            )

        task = dict(temperature=1.0, chunk_tokens=policy.chunk_tokens)
        policy.optimizer.zero_gradients()
        with gpu_branches.NoHostSync():
            scores = score_pass(policy.chunks, microbatches, lambda b: HeadTask(b, features=True, **task))
            metrics = update_pass(policy.chunks, microbatches, lambda b: HeadTask(b, with_gradient=True, **task), loss)
    return [float(m["loss"]) for m in metrics], [s.features for s in scores]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_micro_batch_makes_the_host_wait(layout, precision, ranks, model_folder):
    world, settings = LAYOUTS[layout]
    losses, features = ranks(world, watched, model_folder("qwen3", False), settings, precision)[-1]
    assert losses and all(torch.tensor(losses).isfinite()) and all(f.isfinite().all() for f in features)
