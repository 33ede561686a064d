"""The branch of the head that a GPU takes, on a CPU: 16-bit products with float32 results and a GPU's tiles, against
float64."""

from __future__ import annotations

import gpu_branches
import pytest
import torch

from megatron_g2rl.policy.head import UpdateFeatures, score_tokens, token_logprobs
from megatron_g2rl.policy.head.tiles import update_tiles

CASES = {
    "one tile": (300, 64, 1000, 1000, 40, 1.0),
    "many tiles, padded vocabulary": (700, 64, 3000, 2950, 100, 0.7),
    "few tokens": (5, 32, 513, 513, 2, 1.3),
    "one response": (1030, 48, 1300, 1300, 400, 1.0),
}
RESPONSES = 7


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    gpu_branches.take(monkeypatch)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_both_passes_agree_with_float64(case):
    tokens, size, vocabulary, true, chunk, temperature = CASES[case]
    torch.manual_seed(0)
    hidden = torch.randn(tokens, size).bfloat16()
    weight = (torch.randn(vocabulary, size) * 0.3).bfloat16()
    targets = torch.randint(0, true, (tokens,))
    owner = torch.randint(-1, RESPONSES, (tokens,)).sort().values
    pull, spread = torch.randn(tokens).double(), torch.randn(tokens).double()

    hidden64, weight64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = torch.log_softmax((hidden64 @ weight64.T)[:, :true] / temperature, -1)
    entropy, picked = -(logp.exp() * logp).sum(1), logp.gather(1, targets[:, None])[:, 0]
    ((picked * pull).sum() + (entropy * spread).sum()).backward()
    phi = torch.zeros(RESPONSES, size, dtype=torch.double)
    with torch.no_grad():
        for r in range(RESPONSES):
            own = owner == r
            if own.any():
                phi[r] = (weight64[targets[own]] - logp[own].exp() @ weight64[:true]).sum(0) / own.sum()

    where = dict(temperature=temperature, vocab_size=true, chunk_tokens=chunk)
    hidden16, weight16 = hidden.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
    main_grad = torch.zeros(vocabulary, size)
    found, found_entropy = token_logprobs(hidden16, weight16, targets, with_entropy=True, main_grad=main_grad, **where)
    ((found * pull.float()).sum() + (found_entropy * spread.float()).sum()).backward()
    assert error(found, picked.detach()) < 1e-6 and error(found_entropy, entropy.detach()) < 2e-6
    # The gradient of the logits is rounded to bf16, 2**-9 of itself, before it is multiplied further.
    assert error(main_grad, weight64.grad) < 8e-3 and error(hidden16.grad, hidden64.grad) < 1e-2

    scores = score_tokens(hidden, weight, targets, owner, RESPONSES, **where)
    here = owner >= 0
    assert error(scores.logprobs[here], picked.detach()[here]) < 1e-6
    assert error(scores.features, phi) < 5e-6

    # Half of the tokens have a wrong prior; without one, the kept logits are used.
    wrong = torch.where(torch.arange(tokens) % 2 == 0, 0.05, 1e-6)
    for prior in (found.detach() + wrong, None):
        reported = None if prior is None else prior[here]
        features = UpdateFeatures(owner[here], RESPONSES, prior_logprobs=reported, prior_tolerance=1e-3)
        hidden16 = hidden[here].clone().requires_grad_()
        token_logprobs(hidden16, weight16, targets[here], features=features, main_grad=main_grad, **where)
        assert error(features.phi, phi) < 5e-6


def test_run_lengths_known_to_the_host_change_nothing():
    torch.manual_seed(1)
    hidden, weight = torch.randn(60, 16), torch.randn(100, 16)
    targets, owner = torch.randint(0, 100, (60,)), torch.tensor([2] * 20 + [0] * 30 + [1] * 10)
    where = dict(chunk_tokens=8)
    expected = score_tokens(hidden, weight, targets, owner, 3, **where)
    with gpu_branches.NoHostSync():
        found = score_tokens(hidden, weight, targets, owner, 3, runs=[(2, 20), (0, 30), (1, 10)], **where)
    for name in ("logprobs", "entropy", "features"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_the_tiles_are_those_of_a_gpu():
    assert update_tiles(700, 3000, 100, gpu_branches.GPU) != update_tiles(700, 3000, 100, torch.device("cpu"))
