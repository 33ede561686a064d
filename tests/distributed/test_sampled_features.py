"""Φ from the rollout engine's top-K: for K = V equal to that of the old-log-prob pass, and the same on every layout."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from layout_cases import TEMPERATURE, sequences
from small_policy import make_policy

from megatron_g2rl.records import Response

# A different order of fp32 sums, as in test_layouts.py.
TOLERANCE = 2e-5
VOCABULARY = 307
LAYOUTS = {
    "tp2": (2, dict(tensor_parallel=2)),
    "pp2": (2, dict(pipeline_parallel=2)),
    "pp2_interleaved": (2, dict(pipeline_parallel=2, virtual_stages=2)),
    "dp2": (2, dict()),
    "cp2": (2, dict(context_parallel=2)),
    "tp2_pp2_sp": (4, dict(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True)),
    "tp2_dp2": (4, dict(tensor_parallel=2)),
    "dp7": (7, dict()),
}


@torch.no_grad()
def responses(folder: str, top: int, dtype: str = "float32") -> list[Response]:
    """The responses of `sequences` with the log-probs and top-K of a rollout engine, computed by transformers."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder), []
    for s in sequences(VOCABULARY):
        ids = torch.tensor([[*s.prompt, *s.response]])
        table = torch.log_softmax(model(ids).logits[0] / TEMPERATURE, 1)[len(s.prompt) - 1 : -1]
        own = table.gather(1, torch.tensor(s.response)[:, None]).squeeze(1)
        best = table.topk(top)
        tops = best.indices.numpy().astype(np.int32), best.values.numpy().astype(dtype)
        found.append(Response(s.response, tuple(own.tolist()), "", "stop", 0, *tops))
    return found


def sampled(rank: int, folder: str, layout: dict, drawn: list[Response]):
    """Φ from the top-K on this rank, its cost, and the exact Φ."""
    policy = make_policy(folder, layout)
    policy.temperature = TEMPERATURE
    features, seconds = policy.features_from_topk(drawn)
    exact = policy.score(sequences(VOCABULARY), features=True)
    plain = policy.score(sequences(VOCABULARY), features=False)
    return features, seconds, exact.features, exact.feature_seconds, plain.feature_seconds


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_top_k_of_the_full_vocabulary_gives_the_feature_of_the_old_log_prob_pass(tied, ranks, model_folder):
    folder = model_folder("qwen3", tied)
    found, _, exact, *_ = ranks(1, sampled, folder, {}, responses(folder, VOCABULARY))[0]
    assert error(found, exact) < TOLERANCE
    # Half precision rounds a log-prob by at most 2**-9 below 8, and the rounding errors of many entries cancel.
    found, *_ = ranks(1, sampled, folder, {}, responses(folder, VOCABULARY, "float16"))[0]
    assert error(found, exact) < 2e-3


@pytest.fixture(scope="module")
def one_rank(ranks, model_folder):
    @functools.cache
    def get(tied: bool):
        folder = model_folder("qwen3", tied)
        drawn = responses(folder, 5)
        return folder, drawn, ranks(1, sampled, folder, {}, drawn)[0][0]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_estimates_of_one_rank_on_every_rank(layout, ranks, one_rank):
    world, settings = LAYOUTS[layout]
    # Six responses on seven ranks: one has none. Pipeline stages hold the head or the embedding of a tied model.
    folder, drawn, expected = one_rank("pp" in layout or layout == "tp2")
    results = ranks(world, sampled, folder, settings, drawn)
    for found, seconds, _, exact_seconds, plain_seconds in results:
        assert error(found, expected) < TOLERANCE
        assert seconds == results[0][1] and exact_seconds == results[0][3] and plain_seconds == {}
        for measured in (seconds, exact_seconds):
            assert measured.keys() == {"features", "reduce"} and min(measured.values()) >= 0
            assert 0 < measured["features"] < 60
