"""A world with one backend for the host and one for the device, as on a GPU: a second gloo takes the place of NCCL."""

from __future__ import annotations

import pytest
from small_policy import export, load_policy, make_policy, save_policy, train

LAYOUTS = {
    "dp2": dict(overlap_communication=True),
    "tp2_sp": dict(tensor_parallel=2, sequence_parallel=True),
    "pp2": dict(pipeline_parallel=2),
    "cp2": dict(context_parallel=2),
    "ep2": dict(expert_parallel=2),
}


def save_and_continue(rank: int, folder: str, layout: dict, checkpoints: str):
    from pathlib import Path

    import torch
    from layout_cases import sequences

    policy = make_policy(folder, layout)
    train(policy, 1)
    path = save_policy(policy, Path(checkpoints), 1, {"step": 1}, keep=1)
    load_policy(policy, path)
    losses = train(policy, 1)[0]
    scores = policy.score(sequences(policy.architecture.vocab_size), features=True)
    return losses, export(policy), torch.cat(scores.logprobs), scores.features


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_the_same_with_two_backends(layout, ranks, model_folder, tmp_path, monkeypatch):
    import torch

    from megatron_g2rl.policy import runtime

    folder = model_folder("qwen3_moe" if layout == "ep2" else "qwen3", False)
    results = []
    for name, backend in (("one", "gloo"), ("two", "cpu:gloo,cuda:gloo")):
        monkeypatch.setitem(runtime.BACKENDS, "cpu", backend)
        results.append(ranks(2, save_and_continue, folder, LAYOUTS[layout], str(tmp_path / name))[0])
    (losses, weights, *scores), (other_losses, other_weights, *other_scores) = results
    assert losses == other_losses
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())
    assert all(torch.equal(a, b) for a, b in zip(scores, other_scores, strict=True))
