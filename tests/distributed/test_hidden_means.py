"""Mean hidden states of responses are those of transformers, under every layout; every method trains with them."""

from __future__ import annotations

import pytest
import torch
import transformers
from layout_cases import sequences
from small_policy import make_policy

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2_sp": (2, dict(tensor_parallel=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline_parallel=2)),
    "cp2": (2, dict(context_parallel=2)),
    "interleaved": (2, dict(pipeline_parallel=2, virtual_stages=2)),
    "tp2_cp2": (4, dict(tensor_parallel=2, context_parallel=2)),
}


def score(rank: int, folder: str, layout: dict, features: bool):
    policy = make_policy(folder, layout)
    batch = policy.score(sequences(policy.architecture.vocab_size), features=features, hidden=True)
    return batch.hidden, batch.features, torch.cat(batch.logprobs)


@pytest.fixture(scope="module")
def expected(model_folder) -> torch.Tensor:
    """From transformers: the output of the final norm, at the positions from which response tokens are predicted."""
    folder = model_folder("qwen3", True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    means = []
    for sequence in sequences(model.config.vocab_size):
        ids = torch.tensor([sequence.prompt + sequence.response])
        with torch.no_grad():
            states = model.model(ids).last_hidden_state[0]
        first = len(sequence.prompt) - 1
        chosen = states[first : first + len(sequence.response)]
        means.append(chosen.mean(0) if len(chosen) else torch.zeros(states.shape[1]))
    return torch.stack(means)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_hidden_states_are_those_of_transformers(layout, ranks, model_folder, expected):
    world, settings = LAYOUTS[layout]
    for hidden, features, _ in ranks(world, score, model_folder("qwen3", True), settings, False):
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
        assert features is None


def test_features_and_log_probs_are_the_same_with_hidden_states(ranks, model_folder):
    folder = model_folder("qwen3", True)
    ((_, features, logprobs),) = ranks(1, score, folder, {}, True)
    ((plain, plain_logprobs),) = ranks(1, score_plain, folder)
    assert torch.equal(features, plain) and torch.equal(logprobs, plain_logprobs)


def score_plain(rank: int, folder: str):
    policy = make_policy(folder, {})
    batch = policy.score(sequences(policy.architecture.vocab_size), features=True)
    assert batch.hidden is None
    return batch.features, torch.cat(batch.logprobs)
