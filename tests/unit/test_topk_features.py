"""Φ from the top-K against the exact Φ of the old-log-prob pass, in float64."""

from __future__ import annotations

import pytest
import torch

from megatron_g2rl.exploration import features_from_topk
from megatron_g2rl.policy.head import score_tokens

TOKENS, HIDDEN, VOCAB, RESPONSES = 400, 12, 61, 5
CLOSE = dict(rtol=1e-9, atol=1e-11)
"""float64 throughout: only the order of sums and one exp of a log differ."""


def sampled(temperature=1.0):
    """Hidden states, output embedding, drawn tokens, their responses (the last has none) and the log-softmax."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float64)
    # Rows with a common component, as in real models.
    weight = torch.randn(VOCAB, HIDDEN, generator=g, dtype=torch.float64) + 2
    table = torch.log_softmax(hidden @ weight.t() / temperature, 1)
    targets = torch.multinomial(table.exp(), 1, generator=g).squeeze(1)
    response = torch.randint(-1, RESPONSES - 1, (TOKENS,), generator=g)
    return hidden, weight, targets, response, table


def estimate(k, **options):
    hidden, weight, targets, response, table = sampled()
    top = table.topk(k, 1)
    own = table.gather(1, targets[:, None]).squeeze(1)
    options = dict(target_logprobs=own) | options
    return features_from_topk(top.indices, top.values, targets, weight, response, RESPONSES, **options)


def relative_error(found, expected):
    return ((found - expected)[:-1].norm(dim=1) / expected[:-1].norm(dim=1)).mean().item()


def exact(**options):
    hidden, weight, targets, response, _ = sampled()
    return score_tokens(hidden, weight, targets, response, RESPONSES, **options).features


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_full_vocabulary_gives_the_exact_feature(temperature):
    hidden, weight, targets, response, table = sampled(temperature)
    top = table.topk(VOCAB, 1)
    weights = torch.rand(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = features_from_topk(top.indices, top.values, targets, weight, response, RESPONSES, token_weights=weights)
    expected = score_tokens(
        hidden, weight, targets, response, RESPONSES, temperature=temperature, token_weights=weights
    ).features
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not found[-1].any()


def test_the_error_decreases_with_k_and_is_within_its_bound():
    _, weight, targets, response, table = sampled()
    errors, bounds = [], []
    for k in (1, 5, 20, 40):
        found = estimate(k)
        known = torch.zeros_like(table).scatter(1, table.topk(k, 1).indices, 1.0).scatter(1, targets[:, None], 1.0)
        missing = 1 - (known * table.exp()).sum(1)
        widest = torch.cdist(weight, weight).max()
        for i in range(RESPONSES - 1):
            bound = missing[response == i].mean() * widest
            assert (found[i] - exact()[i]).norm() <= bound
        errors.append(relative_error(found, exact()))
        bounds.append(bound)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05


def test_adding_one_vector_to_all_rows_changes_neither_the_estimate_nor_the_exact_feature():
    hidden, weight, targets, response, table = sampled()
    top = table.topk(3, 1)
    first, second = (
        features_from_topk(top.indices, top.values, targets, w, response, RESPONSES)
        for w in (weight, weight + torch.arange(HIDDEN))
    )
    torch.testing.assert_close(first, second, **CLOSE)


def test_order_repetition_and_absent_entries_change_nothing():
    _, weight, targets, response, table = sampled()
    top = table.topk(6, 1)
    own = table.gather(1, targets[:, None]).squeeze(1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(5))
    ids = torch.cat([top.indices[:, order], top.indices[:, :2], torch.full((TOKENS, 2), -1)], 1)
    logprobs = torch.cat([top.values[:, order], top.values[:, :2], torch.full((TOKENS, 2), -torch.inf)], 1)
    found = features_from_topk(ids.int(), logprobs, targets, weight, response, RESPONSES, target_logprobs=own)
    torch.testing.assert_close(found, estimate(6), **CLOSE)


def test_the_log_prob_of_the_drawn_token_is_used_where_it_is_not_in_the_top_k():
    # One token, known: φ = W_y - (p_1 W_1 + p_y W_y + (1 - p_1 - p_y) W_z), z the only other drawn token outside.
    weight = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    ids, logprobs = torch.tensor([[1], [1]]), torch.tensor([[0.5], [0.6]], dtype=torch.float64).log()
    own = torch.tensor([0.2, 0.1], dtype=torch.float64).log()
    found = features_from_topk(
        ids, logprobs, torch.tensor([2, 3]), weight, torch.tensor([0, 1]), 2, target_logprobs=own
    )
    first = weight[2] - 0.5 * weight[1] - 0.2 * weight[2] - 0.3 * weight[3]
    second = weight[3] - 0.6 * weight[1] - 0.1 * weight[3] - 0.3 * weight[2]
    torch.testing.assert_close(found, torch.stack([first, second]), **CLOSE)


def test_padding_rows_and_low_precision_inputs_are_accepted():
    _, weight, targets, response, table = sampled()
    top = table.topk(6, 1)
    own = table.gather(1, targets[:, None]).squeeze(1)
    padded = torch.cat([weight, torch.full((3, HIDDEN), 50.0)]).float()
    found = features_from_topk(
        top.indices.int(),
        top.values.half(),
        targets,
        padded,
        response,
        RESPONSES,
        target_logprobs=own.half(),
        vocab_size=VOCAB,
    )
    assert found.dtype == torch.float32
    # Half-precision log-probs are off by up to 2^-11 of themselves: an error of 0.1 to 0.2% in a probability.
    assert relative_error(found, estimate(6)) < 2e-3


@pytest.mark.usefixtures("unchecked_shapes")
def test_probabilities_that_add_up_to_more_than_one_are_refused():
    _, weight, targets, response, table = sampled()
    top = table.topk(6, 1)
    with pytest.raises(ValueError, match="sampling temperature"):
        features_from_topk(top.indices, top.values * 0.5, targets, weight, response, RESPONSES)
    with pytest.raises(ValueError, match=r"\[400, K\]"):
        features_from_topk(top.indices[1:], top.values[1:], targets, weight, response, RESPONSES)


def test_no_tokens_give_zero_features():
    found = features_from_topk(
        torch.zeros(0, 3, dtype=torch.long),
        torch.zeros(0, 3),
        torch.zeros(0, dtype=torch.long),
        torch.ones(7, 2),
        torch.zeros(0, dtype=torch.long),
        2,
    )
    assert found.shape == (2, 2) and not found.any()
