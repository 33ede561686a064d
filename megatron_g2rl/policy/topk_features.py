"""Estimate Φ from the rollout engine's top-K log-probs under any parallel layout, and reduce its timing over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_g2rl.exploration import features_from_topk
from megatron_g2rl.policy.head import DeviceTimer
from megatron_g2rl.policy.model import unwrap
from megatron_g2rl.policy.runtime import Runtime
from megatron_g2rl.records import Response


def features_on_ranks(
    chunks: Sequence[nn.Module], runtime: Runtime, vocab_size: int, responses: Sequence[Response], timer: DeviceTimer
) -> Float[Tensor, "responses hidden"]:
    """Φ of every response from its most probable tokens (`exploration.features_from_topk`); the same on every rank.

    Responses are split over the data- and context-parallel ranks of the last stage, the vocabulary over the
    tensor-parallel ranks; the pool of missing mass is that of all responses, so Φ does not depend on the layout.

    Args:
        chunks: this rank's model chunks; their weights must be complete (no gathering in progress).
        runtime: this rank's position in the layout.
        vocab_size: true size of the vocabulary.
        responses: the same list on every rank, all with `top_ids`.
        timer: measures the computation as `features`, and the transfer of Φ to the other stages as `reduce`.
    """
    with timer.measure("features"):
        phi = _on_last_stage(chunks, runtime, vocab_size, responses) if runtime.last_stage else None
    hidden = unwrap(chunks[-1]).config.hidden_size
    if phi is None or runtime.pipeline_size > 1 and not (runtime.reports and _response_split(runtime)[0] == 0):
        phi = torch.zeros(len(responses), hidden, device=runtime.device)
    with timer.measure("reduce"):
        if runtime.pipeline_size > 1:
            dist.all_reduce(phi)
    return phi


def seconds_on_ranks(timer: DeviceTimer, device: torch.device) -> dict[str, float]:
    """Time of Φ, the same on every rank: `features` of the slowest rank, `reduce` of the rank that waited least."""
    seconds = timer.read()
    # inf from ranks that do not take part in a sum; the minimum excludes the time spent waiting for the slowest rank.
    waits = [-seconds.get(name, math.inf) for name in ("reduce_head", "reduce")]
    values = torch.tensor([seconds.get("features", 0.0), *waits], dtype=torch.float64, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    features, *waits = values.tolist()
    return {"features": features, "reduce": sum(-wait for wait in waits if math.isfinite(wait))}


def _response_split(runtime: Runtime) -> tuple[int, int]:
    """(index of this rank's part of the responses, number of parts)."""
    return runtime.data_rank * runtime.context_size + runtime.context_rank, runtime.data_size * runtime.context_size


def _on_last_stage(chunks, runtime, vocab_size, responses) -> Tensor:
    part, parts = _response_split(runtime)
    indices = list(range(part, len(responses), parts))
    local = [responses[i] for i in indices]
    # Start from empty arrays, so that a rank without a response still takes part in the sums.
    ids, logprobs = (np.zeros((0, responses[0].top_ids.shape[1]), dtype) for dtype in (np.int32, np.float32))
    ids = torch.from_numpy(np.concatenate([ids, *(r.top_ids for r in local)]))
    logprobs = torch.from_numpy(np.concatenate([logprobs, *(r.top_logprobs for r in local)]))
    owner = torch.tensor([i for i in indices for _ in responses[i].token_ids], dtype=torch.long)
    targets = torch.tensor([token for r in local for token in r.token_ids], dtype=torch.long)
    target_logprobs = torch.tensor([value for r in local for value in r.logprobs], dtype=torch.float32)
    gpt = next(gpt for gpt in map(unwrap, chunks) if gpt.post_process)
    weight = gpt.output_layer.weight
    if gpt.share_embeddings_and_output_weights:
        weight = gpt.shared_embedding_or_output_weight()
    device = runtime.device
    return features_from_topk(
        ids.to(device),
        logprobs.to(device),
        targets.to(device),
        weight,
        owner.to(device),
        len(responses),
        target_logprobs=target_logprobs.to(device),
        vocab_start=runtime.tensor_rank * len(weight),
        vocab_size=vocab_size,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        reduce_group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
    )
