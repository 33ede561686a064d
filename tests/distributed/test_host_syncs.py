"""No micro-batch causes a host-device synchronization in the layers, the head or the loss, in either pass."""

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
    """Log-probs and Φ of a pass over micro-batches, and the loss of an update, all with synchronizations refused."""
    import gpu_branches
    from megatron.core.tensor_parallel import random
    from small_policy import make_policy

    from megatron_g2rl.config.sections.method import AlgorithmConfig
    from megatron_g2rl.policy import packing
    from megatron_g2rl.policy.model import HeadRequest
    from megatron_g2rl.policy.schedule import forward_pass, update_pass
    from megatron_g2rl.records import Experience, Prompt, Response, ResponseGroup
    from megatron_g2rl.training.updates import update_loss

    with pytest.MonkeyPatch.context() as patch:
        policy = make_policy(folder, layout | dict(precision=precision))
        gpu_branches.take(patch)
        # It compares states of the CPU generator, on the host even with a GPU.
        patch.setattr(random.CudaRNGStatesTracker, "fork", lambda self, *args: contextlib.nullcontext())
        batch = sequences(policy.architecture.vocab_size)
        microbatches = policy.microbatches(batch)
        old = tuple(torch.full((len(s.response),), -4.0) for s in batch)
        responses = [Response(s.response, (-4.0,) * len(s.response), "", "stop", i) for i, s in enumerate(batch)]
        groups = tuple(ResponseGroup(Prompt(0, "", (1,), ""), (response,)) for response in responses)
        ones = torch.ones(len(batch))
        experience = Experience(groups, ones, ones.bool(), ones, ones, ones.bool(), reference_logprobs=old)
        algorithm = AlgorithmConfig(kl_coefficient=0.1, entropy_coefficient=0.1, importance_cap=2.0)
        row_loss = update_loss(algorithm, experience, list(range(len(batch))), old, policy.context_group)

        def loss(values, b):
            return row_loss(*(packing.to_rows(values[:, i], b) for i in (0, 1)), b)

        task = dict(temperature=1.0, chunk_tokens=policy.chunk_tokens)
        policy.optimizer.zero_gradients()
        with gpu_branches.NoHostSync():
            scores = forward_pass(policy.chunks, microbatches, lambda b: HeadRequest(b, features=True, **task))
            metrics = update_pass(
                policy.chunks, microbatches, lambda b: HeadRequest(b, with_gradient=True, **task), loss
            )
    return [float(m["loss"]) for m in metrics], [s.features for s in scores]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_micro_batch_synchronizes_host_and_device(layout, precision, ranks, model_folder):
    world, settings = LAYOUTS[layout]
    losses, features = ranks(world, watched, model_folder("qwen3", False), settings, precision)[-1]
    assert losses and all(torch.tensor(losses).isfinite()) and all(f.isfinite().all() for f in features)
