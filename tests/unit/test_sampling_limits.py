"""Greedy decoding, top-p, top-k and min-p against the logits processors and `generate` of transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_models import write_random_model
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_g2rl.records import Prompt
from megatron_g2rl.rollout.engine import RolloutRequest, Sampling
from megatron_g2rl.rollout.sampling import distribution
from megatron_g2rl.rollout.transformers import TransformersEngine

PLAIN = Sampling(group_size=1, temperature=1.0, max_response_tokens=12, run_seed=0, step=0, stream="eval")
LIMITS = [
    dict(top_p=0.7),
    dict(top_k=5),
    dict(min_p=0.2),
    dict(top_p=0.9, top_k=9, min_p=0.05),
    dict(top_p=1e-6),
    dict(top_k=10_000),
    dict(min_p=1.0),
]


def by_transformers(logits, sampling: Sampling) -> torch.Tensor:
    """The same limits in vLLM's order: temperature, min-p, top-k, top-p."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return torch.log_softmax(warpers(None, logits), dim=-1)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.4])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_distribution_is_that_of_transformers(limits, temperature):
    logits = 3 * torch.randn(64, 400, generator=torch.Generator().manual_seed(0))
    sampling = replace(PLAIN, temperature=temperature, **limits)
    found, expected = distribution(logits, sampling), by_transformers(logits, sampling)
    assert torch.equal(found.isfinite(), expected.isfinite())
    kept = expected.isfinite()
    # float32 sums in another order
    torch.testing.assert_close(found[kept], expected[kept], atol=2e-5, rtol=1e-5)


def test_without_limits_the_distribution_is_bitwise_that_of_training():
    logits = torch.randn(8, 100)
    assert torch.equal(distribution(logits, replace(PLAIN, temperature=0.8)), torch.log_softmax(logits / 0.8, -1))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return write_random_model(tmp_path_factory.mktemp("model"), head_dim=16)


@pytest.fixture(scope="module")
def engine(model_path) -> TransformersEngine:
    return TransformersEngine(model_path, dtype=torch.float32, device=torch.device("cpu"))


PROMPTS = [Prompt(i, "", tuple(range(5 + 7 * i, 9 + 8 * i)), "") for i in range(4)]


def test_greedy_responses_are_those_of_transformers_whatever_the_seed(engine, model_path):
    greedy = replace(PLAIN, temperature=0.0)
    groups = engine.generate(RolloutRequest(PROMPTS, greedy))
    other = engine.generate(RolloutRequest(PROMPTS, replace(greedy, run_seed=9)))
    model = AutoModelForCausalLM.from_pretrained(model_path)
    for prompt, group, again in zip(PROMPTS, groups, other, strict=True):
        output = model.generate(torch.tensor([prompt.token_ids]), do_sample=False, max_new_tokens=12)[0]
        tokens = group.responses[0].token_ids
        assert list(tokens) == output[len(prompt.token_ids) :].tolist() and tokens == again.responses[0].token_ids
        assert all(value < 0 for value in group.responses[0].logprobs)  # of the distribution at temperature 1


def test_every_sampled_token_is_among_the_most_probable_ones(engine, model_path):
    groups = engine.generate(RolloutRequest(PROMPTS, replace(PLAIN, group_size=6, top_k=3)))
    model = AutoModelForCausalLM.from_pretrained(model_path)
    ranks = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([group.prompt.token_ids + response.token_ids])
            logits = model(ids).logits[0, len(group.prompt.token_ids) - 1 : -1]
            ranks += (
                (logits.argsort(descending=True) == torch.tensor(response.token_ids)[:, None]).nonzero()[:, 1].tolist()
            )
    assert set(ranks) == {0, 1, 2}
