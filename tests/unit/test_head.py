"""The head's log-probs, entropy and Φ against autograd and float64, on one rank."""

from __future__ import annotations

import pytest
import torch

from megatron_g2rl.policy.head import score_tokens, softmax, tiles, token_logprobs
from megatron_g2rl.policy.head.products import Products

# Torch alone, the same version with both.
pytestmark = pytest.mark.same_for_both

TOKENS, HIDDEN, VOCAB, RESPONSES = 23, 12, 31, 4


def inputs(dtype=torch.float64, padding=0):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB + padding, HIDDEN, generator=g, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    # Responses of different lengths, interleaved, one of them (3) empty, separated by prompt tokens.
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


def test_token_weights_weight_the_average():
    hidden, weight, targets, response = inputs()
    token_weights = torch.rand(TOKENS, dtype=torch.float64)
    hidden.requires_grad_()
    _, logprobs = reference_logprobs(hidden, weight, targets, 1.0)
    mine = response == 1
    (gradient,) = torch.autograd.grad((logprobs * token_weights)[mine].sum(), hidden)
    scores = score_tokens(hidden.detach(), weight, targets, response, RESPONSES, token_weights=token_weights)
    expected = gradient.sum(0) / token_weights[mine].sum()
    torch.testing.assert_close(scores.features[1], expected, rtol=1e-10, atol=1e-12)


def test_padded_vocabulary_rows_are_ignored():
    hidden, weight, targets, response = inputs(padding=9)
    weight[VOCAB:] = 50.0  # would dominate the softmax if they counted
    padded = score_tokens(hidden, weight, targets, response, RESPONSES, vocab_size=VOCAB)
    plain = score_tokens(hidden, weight[:VOCAB], targets, response, RESPONSES)
    for name in ("logprobs", "entropy", "features"):
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name))
    assert (padded.logprobs <= 0).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_features_are_float32_and_close_to_float64_in_lower_precision(dtype, tolerance):
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
@pytest.mark.parametrize("chunk_tokens", [1, 7, 9])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_update_gradients_pass_gradcheck(with_entropy, chunk_tokens, temperature):
    # small: the numerical derivative evaluates the function twice for each element
    vocabulary, tokens, size = 13, 9, 5
    hidden, weight, targets, _ = inputs()
    hidden, targets = hidden[:tokens, :size].clone().requires_grad_(), targets[:tokens] % vocabulary
    weight = weight[: vocabulary + 3, :size].clone().requires_grad_()  # 3 padded rows

    def run(h, w):
        return token_logprobs(
            h,
            w,
            targets,
            temperature=temperature,
            vocab_size=vocabulary,
            chunk_tokens=chunk_tokens,
            with_entropy=with_entropy,
        )

    assert torch.autograd.gradcheck(run, (hidden, weight))
    values = run(hidden, weight)
    table, expected = reference_logprobs(hidden, weight[:vocabulary], targets, temperature)
    torch.testing.assert_close(values[0] if with_entropy else values, expected)
    if with_entropy:
        torch.testing.assert_close(values[1], torch.distributions.Categorical(logits=table).entropy())


def test_update_of_no_tokens_gives_zero_gradients():
    hidden, weight, targets, _ = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    token_logprobs(hidden[:0], weight, targets[:0]).sum().backward()
    assert not weight.grad.any() and not hidden.grad.any()


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest tensor that any operation allocates."""

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
        values = token_logprobs(hidden, weight, targets, chunk_tokens=chunk, with_entropy=True)
    kept = sum(tile.numel() for tile in values[0].grad_fn.kept.values())
    assert 0 < kept <= 3 * chunk * vocab, "what is kept for backward has to fit too"
    with seen:
        (values[0].sum() + values[1].sum()).backward()
    assert not values[0].grad_fn.kept
    assert chunk * vocab <= seen.elements <= 3 * chunk * vocab


@pytest.fixture(params=[(6, 4), (35, 7), (1, 1)], ids=["6x4", "35x7", "1x1"])
def small_tiles(request, monkeypatch):
    """Tiles that do not divide the table: edges in both directions."""
    elements, columns = request.param
    monkeypatch.setattr(tiles, "CPU_TILE", elements)
    monkeypatch.setattr(tiles, "CPU_COLUMNS", columns)


@pytest.mark.parametrize("chunk_tokens", range(1, TOKENS + 1, 4))
def test_no_result_depends_on_the_tiling_of_the_table(small_tiles, chunk_tokens):
    hidden, weight, targets, response = inputs(padding=3)
    hidden.requires_grad_(), weight.requires_grad_()
    table, expected = reference_logprobs(hidden, weight[:VOCAB], targets, 0.8)
    entropy = torch.distributions.Categorical(logits=table).entropy()
    pull = torch.randn(2, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = torch.autograd.grad((pull[0] * expected + pull[1] * entropy).sum(), (hidden, weight))
    where = dict(temperature=0.8, vocab_size=VOCAB, chunk_tokens=chunk_tokens)
    values = token_logprobs(hidden, weight, targets, with_entropy=True, **where)
    close = dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(values, (expected, entropy), **close)
    found = torch.autograd.grad((pull[0] * values[0] + pull[1] * values[1]).sum(), (hidden, weight), retain_graph=True)
    torch.testing.assert_close(found, wanted, **close)
    again = torch.autograd.grad((pull[0] * values[0] + pull[1] * values[1]).sum(), (hidden, weight))
    torch.testing.assert_close(again, wanted, **close)  # the kept tiles are used up
    plain = score_tokens(hidden, weight, targets, response, RESPONSES, temperature=0.8, vocab_size=VOCAB)
    scores = score_tokens(hidden, weight, targets, response, RESPONSES, **where)
    torch.testing.assert_close(scores.features, plain.features, **close)
    torch.testing.assert_close(scores.logprobs, plain.logprobs, **close)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tokens, vocabulary, chunk", [(1, 1, 1), (16_384, 151_936, 147), (4096, 512, 4000), (0, 9, 4)])
def test_tiles_stay_within_their_memory_budget(device, tokens, vocabulary, chunk):
    # float32 tables: on a CPU two scratch tiles, on a GPU one and its 16-bit copy.
    cut = tiles.update_tiles(tokens, vocabulary, chunk, torch.device(device))
    assert (2 if device == "cpu" else 1.5) * cut.rows * cut.columns + cut.kept <= 3 * chunk * vocabulary
    cut = tiles.score_tiles(tokens, vocabulary, chunk, torch.device(device))
    held = cut.rows * (vocabulary + cut.columns) if device == "cpu" else 2 * cut.rows * vocabulary
    assert held <= 3 * chunk * vocabulary
    cut = tiles.prior_tiles(tokens, vocabulary, chunk)
    assert cut.rows % cut.strip == 0
    assert (min(cut.rows, max(tokens, 1)) + cut.strip) * cut.columns <= min(3 * chunk * vocabulary, 2 * tiles.CPU_TILE)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_code_compiled_for_a_gpu_computes_the_same_as_on_a_cpu(with_entropy):
    g = torch.Generator().manual_seed(4)
    z, top = torch.randn(5, 9, generator=g, dtype=torch.float64) * 4, torch.randn(5, generator=g, dtype=torch.float64)
    local, inside = softmax.within(torch.tensor([2, 40, 11, 19, 3]), 11, 9)
    assert inside.tolist() == [False, False, True, True, False]
    room = torch.empty(2, 5, 9, dtype=torch.float64)
    here = softmax._tile_softmax_in_cache(z, top, local, 0.7, *room)
    torch.testing.assert_close(softmax._tile_softmax(z, top, local, 0.7), here, rtol=1e-12, atol=1e-14)
    log_partition, entropy, gradient, pull = torch.randn(4, 5, generator=g, dtype=torch.float64)
    pull = pull if with_entropy else None
    numbers = (log_partition, entropy, gradient, pull, 0.7, torch.float64)
    here = softmax.logits_gradient(z.clone(), local, inside, *numbers, torch.empty_like(z))
    there = softmax._tile_gradient(
        z, local, gradient * inside, log_partition, entropy, gradient, torch.zeros(5) if pull is None else pull,
        0.7, torch.float64,
    )  # fmt: skip
    torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)


def test_both_passes_give_an_unchanged_policy_ratio_one_in_bfloat16():
    g = torch.Generator().manual_seed(6)
    hidden = torch.randn(200, 64, generator=g).bfloat16()
    weight = torch.randn(3000, 64, generator=g).bfloat16()
    targets = torch.randint(0, 3000, (200,), generator=g)
    old = score_tokens(hidden, weight, targets, torch.zeros(200, dtype=torch.long), 1, chunk_tokens=32).logprobs
    new = token_logprobs(hidden, weight, targets, chunk_tokens=7)
    # Products of bfloat16 are exact in float32: only the order of sums of 64 terms differs, in logits up to 40.
    assert (new - old).exp().sub(1).abs().max() < 2e-5
    exact = torch.log_softmax(hidden.double() @ weight.double().t(), -1).gather(1, targets[:, None]).squeeze(1)
    assert (new - exact).abs().max() < 2e-5
    rounded = torch.log_softmax((hidden @ weight.t()).float(), -1).gather(1, targets[:, None]).squeeze(1)
    assert (rounded - exact).abs().max() > 1e-2, "bfloat16 logits: why they are float32 here"


def test_gradients_are_added_to_megatrons_buffer_without_rounding_to_bfloat16():
    g = torch.Generator().manual_seed(7)
    weight = torch.randn(400, 16, generator=g).bfloat16().requires_grad_()
    weight.grad_added_to_main_grad = False
    main_grad = torch.zeros(400, 16)
    exact = torch.zeros(400, 16, dtype=torch.float64)
    rounded = torch.zeros(400, 16)
    for _ in range(8):  # micro-batches
        hidden, targets = torch.randn(30, 16, generator=g).bfloat16(), torch.randint(0, 400, (30,), generator=g)
        token_logprobs(hidden, weight, targets, main_grad=main_grad).sum().backward()
        assert weight.grad_added_to_main_grad
        weight.grad = None  # Megatron's hook discards it unread
        copy = weight.detach().double().requires_grad_()
        _, logprobs = reference_logprobs(hidden.double(), copy, targets, 1.0)
        (gradient,) = torch.autograd.grad(logprobs.sum(), copy)
        exact += gradient
        rounded += torch.autograd.grad(token_logprobs(hidden, weight, targets).sum(), weight)[0].float()
    error = (main_grad - exact).norm() / exact.norm()
    # float32 sums of hundreds of terms; bfloat16 rounds to 2**-9 of each number.
    assert error < 1e-6 and (rounded - exact).norm() / exact.norm() > 100 * error


def test_the_gradient_of_a_tied_weight_is_not_added_twice():
    hidden, weight, targets, _ = inputs(torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    weight.zero_out_wgrad, main_grad = True, torch.zeros_like(weight)
    embedded = torch.nn.functional.embedding(targets, weight)
    values = token_logprobs(hidden, weight, targets, main_grad=main_grad)
    (values.sum() + embedded.sum()).backward()
    expected = torch.zeros_like(weight).index_add_(0, targets, torch.ones_like(embedded))
    torch.testing.assert_close(weight.grad, expected)
    assert main_grad.any()


def test_masked_losses_give_zero_gradients_and_no_nans():
    hidden, weight, targets, _ = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = token_logprobs(hidden * 1e3, weight, targets, with_entropy=True)
    ((logprobs + entropy) * 0).sum().backward()  # logits in the ten thousands: probabilities of exactly 0 and 1
    assert not hidden.grad.any() and not weight.grad.any()


def test_several_steps_train_like_full_logits():
    g = torch.Generator().manual_seed(8)
    start = [torch.randn(n, 12, generator=g) * 0.3 for n in (50, 50)]
    tokens = torch.randint(0, 50, (6, 40), generator=g)

    def losses(logprobs_and_entropy):
        embedding, output = (torch.nn.Parameter(x.clone()) for x in start)
        optimizer, found = torch.optim.Adam([embedding, output], lr=0.02), []
        for row in tokens:
            logprobs, entropy = logprobs_and_entropy(torch.tanh(embedding[row[:-1]]), output, row[1:])
            loss = -logprobs.mean() - 0.01 * entropy.mean()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            found.append(loss.item())
        return torch.tensor(found)

    def plain(hidden, weight, targets):
        logits = hidden @ weight.t() / 0.9
        logprobs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        return logprobs, torch.distributions.Categorical(logits=logits).entropy()

    ours = losses(lambda h, w, t: token_logprobs(h, w, t, temperature=0.9, with_entropy=True, chunk_tokens=5))
    # float32: Adam amplifies rounding of tiny gradients, up to a step of 0.02.
    torch.testing.assert_close(ours, losses(plain), rtol=2e-5, atol=0)


def test_only_response_tokens_are_multiplied_with_the_vocabulary(monkeypatch):
    seen, original = [], Products.__init__

    def counting(self, hidden, *rest):
        seen.append(len(hidden))
        original(self, hidden, *rest)

    monkeypatch.setattr(Products, "__init__", counting)
    hidden, weight, targets, response = inputs()
    score_tokens(hidden, weight, targets, response, RESPONSES)
    score_tokens(hidden, weight, targets, response, RESPONSES, features=False)
    assert seen == [int((response >= 0).sum())] * 2
