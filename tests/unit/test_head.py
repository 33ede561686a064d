"""The head's log-probs, entropy and Φ against autograd and float64, on one rank."""

from __future__ import annotations

import pytest
import torch

from megatron_g2rl.policy.head import score_tokens, token_logprobs

TOKENS, HIDDEN, VOCAB, RESPONSES = 23, 12, 31, 4


def inputs(dtype=torch.float64, padding=0):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB + padding, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    # Responses of different lengths, interleaved, one of them (3) empty, with prompt tokens between.
    response = torch.randint(-1, RESPONSES - 1, (TOKENS,), generator=g)
    return hidden, weight, targets, response


def reference_logprobs(hidden, weight, targets, temperature):
    table = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    return table, table.gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_feature_is_autograd_of_the_summed_logprob_times_temperature_averaged(temperature, chunk_tokens):
    hidden, weight, targets, response = inputs()
    hidden.requires_grad_()
    table, logprobs = reference_logprobs(hidden, weight, targets, temperature)
    expected = torch.zeros(RESPONSES, HIDDEN, dtype=torch.float64)
    for i in range(RESPONSES):
        mine = response == i
        if mine.any():
            (gradient,) = torch.autograd.grad(logprobs[mine].sum(), hidden, retain_graph=True)
            expected[i] = temperature * gradient.sum(0) / mine.sum()
    scores = score_tokens(
        hidden.detach(), weight, targets, response, RESPONSES, temperature=temperature, chunk_tokens=chunk_tokens
    )
    # float64 throughout: only the order of sums differs.
    torch.testing.assert_close(scores.features, expected, rtol=1e-10, atol=1e-12)
    here = response >= 0
    torch.testing.assert_close(scores.logprobs[here], logprobs.detach()[here], rtol=1e-10, atol=1e-12)
    entropy = torch.distributions.Categorical(logits=table.detach()).entropy()
    torch.testing.assert_close(scores.entropy[here], entropy[here], rtol=1e-10, atol=1e-12)
    assert not scores.logprobs[~here].any() and not scores.entropy[~here].any()


def test_token_weights_weigh_the_average():
    hidden, weight, targets, response = inputs()
    token_weights = torch.rand(TOKENS, dtype=torch.float64)
    hidden.requires_grad_()
    _, logprobs = reference_logprobs(hidden, weight, targets, 1.0)
    mine = response == 1
    (gradient,) = torch.autograd.grad((logprobs * token_weights)[mine].sum(), hidden)
    scores = score_tokens(hidden.detach(), weight, targets, response, RESPONSES, token_weights=token_weights)
    expected = gradient.sum(0) / token_weights[mine].sum()
    torch.testing.assert_close(scores.features[1], expected, rtol=1e-10, atol=1e-12)


def test_padded_vocabulary_rows_take_no_part():
    hidden, weight, targets, response = inputs(padding=9)
    weight[VOCAB:] = 50.0  # would dominate the softmax if they counted
    padded = score_tokens(hidden, weight, targets, response, RESPONSES, vocab_size=VOCAB)
    plain = score_tokens(hidden, weight[:VOCAB], targets, response, RESPONSES)
    for name in ("logprobs", "entropy", "features"):
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name))
    assert (padded.logprobs <= 0).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_features_are_float32_and_near_float64_in_lower_precision(dtype, tolerance):
    # float32: rounding of sums of 12 to 31 terms; bfloat16: logits rounded to 8 bits.
    hidden, weight, targets, response = inputs(dtype)
    exact = score_tokens(hidden.double(), weight.double(), targets, response, RESPONSES)
    scores = score_tokens(hidden, weight, targets, response, RESPONSES)
    assert scores.features.dtype == scores.logprobs.dtype == torch.float32
    assert (scores.features.double() - exact.features).abs().max() < tolerance * exact.features.abs().max()


def test_no_response_tokens_give_zeros_of_the_right_shape():
    hidden, weight, targets, _ = inputs()
    scores = score_tokens(hidden, weight, targets, torch.full((TOKENS,), -1), RESPONSES)
    assert scores.features.shape == (RESPONSES, HIDDEN) and not scores.features.any()
    assert not scores.logprobs.any()
    empty = score_tokens(hidden[:0], weight, targets[:0], targets[:0], 0)
    assert empty.logprobs.shape == (0,) and empty.features.shape == (0, HIDDEN)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_update_gradients_pass_gradcheck(with_entropy, chunk_tokens, temperature):
    hidden, weight, targets, _ = inputs(padding=3)
    hidden, targets = hidden[:9].requires_grad_(), targets[:9]
    weight.requires_grad_()

    def run(h, w):
        return token_logprobs(
            h,
            w,
            targets,
            temperature=temperature,
            vocab_size=VOCAB,
            chunk_tokens=chunk_tokens,
            with_entropy=with_entropy,
        )

    assert torch.autograd.gradcheck(run, (hidden, weight))
    values = run(hidden, weight)
    table, expected = reference_logprobs(hidden, weight[:VOCAB], targets, temperature)
    torch.testing.assert_close(values[0] if with_entropy else values, expected)
    if with_entropy:
        torch.testing.assert_close(values[1], torch.distributions.Categorical(logits=table).entropy())


def test_update_of_no_tokens_gives_zero_gradients():
    hidden, weight, targets, _ = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    token_logprobs(hidden[:0], weight, targets[:0]).sum().backward()
    assert not weight.grad.any() and not hidden.grad.any()


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().nbytes():
                self.elements = max(self.elements, x.numel())
        return result


def test_neither_pass_holds_the_logits_of_all_tokens():
    tokens, vocab, chunk = 512, 1000, 16
    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    with _LargestTensor() as seen:
        score_tokens(hidden, weight, targets, torch.zeros(tokens, dtype=torch.long), 1, chunk_tokens=chunk)
        sum(x.sum() for x in token_logprobs(hidden, weight, targets, chunk_tokens=chunk, with_entropy=True)).backward()
    assert chunk * vocab <= seen.elements < 2 * chunk * vocab
