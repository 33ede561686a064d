"""The head's sweep from a prior (the rollout engine's log-probs) against autograd and float64, whatever the prior."""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_g2rl.policy.head import UpdateFeatures, score_tokens, tiles, token_logprobs

# Torch alone, the same version with both.
pytestmark = pytest.mark.same_for_both

TOKENS, HIDDEN, VOCAB, RESPONSES = 37, 12, 53, 5
EXACT = dict(rtol=1e-10, atol=1e-12)
"""float64 throughout: only the order of sums differs."""


def inputs(padding=0):
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g, dtype=torch.float64)
    weight = torch.randn(VOCAB + padding, HIDDEN, generator=g, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    # Responses of different lengths, interleaved, one of them (4) empty, with prompt tokens between.
    response = torch.randint(-1, RESPONSES - 1, (TOKENS,), generator=g)
    return hidden, weight, targets, response


def reference(hidden, weight, targets, response, temperature=1.0, token_weights=None):
    """(log-probs, entropy, Φ, softmax) in float64, Φ as the gradient of the summed log-probs."""
    hidden = hidden.double().requires_grad_()
    table = torch.log_softmax(hidden @ weight.double().t() / temperature, -1)
    logprobs = table.gather(1, targets[:, None]).squeeze(1)
    a = torch.ones(len(targets), dtype=torch.float64) if token_weights is None else token_weights
    phi = torch.zeros(RESPONSES, hidden.shape[1], dtype=torch.float64)
    for i in range(RESPONSES):
        mine = response == i
        if mine.any():
            (gradient,) = torch.autograd.grad((a * logprobs)[mine].sum(), hidden, retain_graph=True)
            phi[i] = temperature * gradient.sum(0) / a[mine].sum()
    entropy = torch.distributions.Categorical(logits=table.detach()).entropy()
    return logprobs.detach(), entropy, phi, table.detach().exp()


def assert_equal(scores, expected, response, **close):
    logprobs, entropy, phi, _ = expected
    here = response >= 0
    torch.testing.assert_close(scores.logprobs[here].double(), logprobs[here], **close)
    torch.testing.assert_close(scores.entropy[here].double(), entropy[here], **close)
    assert not scores.logprobs[~here].any() and not scores.entropy[~here].any()
    if scores.features is not None:
        torch.testing.assert_close(scores.features.double(), phi, **close)


def broken(kind: str, logprobs):
    """Log-probs as a broken rollout engine would report them."""
    prior, some = logprobs.clone(), torch.arange(len(logprobs)) % 3 == 0
    if kind == "all wrong by hundreds":
        return prior + torch.where(some, 300.0, -400.0).to(prior)
    wrong = {
        "exact": 0.0, "high": 1.5, "too high": 5.0, "much too high": 9.0, "too low": -5.0, "far too high": 90.0,
        "far too low": -800.0, "hundreds": 300.0, "overflow": 1e300, "nan": torch.nan, "inf": torch.inf,
        "minus inf": -torch.inf,
    }  # fmt: skip
    prior[some] += wrong[kind]
    return prior


KINDS = (
    *("exact", "high", "too high", "much too high", "too low", "far too high", "far too low", "hundreds", "overflow"),
    *("nan", "inf", "minus inf", "all wrong by hundreds"),
)


@pytest.fixture(params=[(6, 4), (35, 7), (2**18, 1024)], ids=["6x4", "35x7", "one"])
def any_tiles(request, monkeypatch):
    """Tiles that do not divide the table, and one tile for all of it."""
    elements, columns = request.param
    monkeypatch.setattr(tiles, "CPU_TILE", elements)
    monkeypatch.setattr(tiles, "CPU_COLUMNS", columns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_any_prior_gives_the_numbers_of_float64(any_tiles, kind, temperature):
    hidden, weight, targets, response = inputs(padding=9)
    weight[VOCAB:] = 50.0  # would dominate the softmax if they counted
    a = torch.rand(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.1
    expected = reference(hidden, weight[:VOCAB], targets, response, temperature, a)
    options = dict(temperature=temperature, token_weights=a, vocab_size=VOCAB, prior_tolerance=1e-12)
    prior = broken(kind, expected[0])
    scores = score_tokens(hidden, weight, targets, response, RESPONSES, prior_logprobs=prior, **options)
    assert_equal(scores, expected, response, **EXACT)
    without = score_tokens(
        hidden, weight, targets, response, RESPONSES, prior_logprobs=prior, features=False, **options
    )
    assert_equal(without, expected, response, **EXACT)
    assert without.features is None and without.swept_again == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-5)])
def test_any_prior_gives_float32_results_in_lower_precision(kind, dtype, tolerance):
    # The reference has the same rounded inputs; float32 sums of 12 to 53 terms.
    hidden, weight, targets, response = inputs()
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    expected = reference(hidden, weight, targets, response)
    prior = broken(kind, expected[0]).float()
    scores = score_tokens(hidden, weight, targets, response, RESPONSES, prior_logprobs=prior, prior_tolerance=1e-6)
    assert scores.features.dtype == scores.logprobs.dtype == torch.float32
    assert_equal(scores, expected, response, rtol=tolerance, atol=tolerance)


def update(hidden, weight, targets, owner, features=None, **options):
    """Log-probs, entropy and both gradients of the update pass."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    values = token_logprobs(hidden, weight, targets, with_entropy=True, features=features, **options)
    pull = torch.linspace(-1, 2, len(targets), dtype=values[0].dtype)
    (values[0] * pull + values[1] * pull.flip(0)).sum().backward()
    return *(x.detach() for x in values), hidden.grad, weight.grad


@pytest.mark.parametrize("kind", [*KINDS, "no prior"])
@pytest.mark.parametrize(
    "tile, dtype, tolerance, chunk_tokens",
    [((6, 4), torch.float64, 1e-12, 1), ((35, 7), torch.float64, 1e-12, 1000), (None, torch.float32, 1e-6, 1000)],
    ids=["recomputed", "kept", "float32"],
)
def test_the_update_computes_the_same_features_and_the_bits_of_an_update_without_them(
    kind, tile, dtype, tolerance, chunk_tokens, monkeypatch
):
    """With `chunk_tokens=1000` the backward uses logits that the forward has kept, else it computes them again."""
    if tile:
        monkeypatch.setattr(tiles, "CPU_TILE", tile[0])
        monkeypatch.setattr(tiles, "CPU_COLUMNS", tile[1])
    hidden, weight, targets, response = inputs(padding=9)
    weight[VOCAB:] = 50.0
    chosen = (response >= 0).nonzero().squeeze(1)
    expected = reference(hidden, weight[:VOCAB], targets, response, 0.6)
    prior = None if kind == "no prior" else broken(kind, expected[0])[chosen].to(dtype)
    operands = hidden[chosen].to(dtype), weight.to(dtype), targets[chosen], response[chosen]
    options = dict(temperature=0.6, vocab_size=VOCAB, chunk_tokens=chunk_tokens)
    features = UpdateFeatures(response[chosen], RESPONSES, prior_logprobs=prior, prior_tolerance=tolerance)
    found = update(*operands, features, **options)
    assert features.phi.dtype == dtype and not features.phi.requires_grad
    # float32: sums of 12 to 53 terms of order 1.
    close = EXACT if dtype == torch.float64 else dict(rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(features.phi.double(), expected[2], **close)
    assert all(map(torch.equal, found, update(*operands, **options)))


def test_the_update_leaves_priors_within_the_tolerance_uncorrected():
    hidden, weight, targets, response = inputs()
    expected = reference(hidden, weight, targets, response)
    chosen = (response >= 0).nonzero().squeeze(1)
    prior = expected[0] + 0.01 * torch.randn(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scored = score_tokens(hidden, weight, targets, response, RESPONSES, prior_logprobs=prior, prior_tolerance=0.2)
    features = UpdateFeatures(response[chosen], RESPONSES, prior_logprobs=prior[chosen], prior_tolerance=0.2)
    update(hidden[chosen], weight, targets[chosen], response[chosen], features)
    torch.testing.assert_close(features.phi, scored.features, **EXACT)
    assert (features.phi - expected[2]).norm() > 1e-4


def test_an_update_without_tokens_has_no_features():
    hidden, weight, targets, _ = inputs()
    features = UpdateFeatures(targets[:0], 0, prior_logprobs=hidden[:0, 0], prior_tolerance=1e-3)
    update(hidden[:0], weight, targets[:0], None, features)
    assert features.phi.shape == (0, HIDDEN)


def test_features_of_an_uncorrected_prior_err_by_no_more_than_their_partition_sums_bound():
    hidden, weight, targets, response = inputs()
    expected = reference(hidden, weight, targets, response)
    logprobs, _, phi, _ = expected
    wrong = 0.01 * torch.randn(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    options = dict(prior_logprobs=logprobs + wrong, prior_tolerance=0.2)
    scores = score_tokens(hidden, weight, targets, response, RESPONSES, **options)
    assert scores.swept_again == 0
    here = response >= 0
    torch.testing.assert_close(scores.logprobs[here], logprobs[here], **EXACT)  # never depends on the tolerance
    for i in range(RESPONSES - 1):
        mine = response == i
        bound = wrong[mine].expm1().abs().sum() / mine.sum() * weight.norm(dim=1).max()
        assert 0 < (scores.features[i] - phi[i]).norm() <= bound


def test_the_tokens_above_the_tolerance_are_counted_and_corrected():
    hidden, weight, targets, response = inputs()
    expected = reference(hidden, weight, targets, response)
    chosen = (response >= 0).nonzero().squeeze(1)
    prior = expected[0].clone()
    prior[chosen[:4]] += 0.05
    prior[chosen[4:]] += 1e-13
    for tolerance, count in ((0.04, 4), (0.06, 0), (1e-14, len(chosen))):
        options = dict(prior_logprobs=prior, prior_tolerance=tolerance)
        scores = score_tokens(hidden, weight, targets, response, RESPONSES, **options)
        assert scores.swept_again == count or tolerance == 1e-14  # where rounding decides
        if count:
            assert_equal(scores, expected, response, **EXACT)
    overflowing = expected[0].clone()
    overflowing[chosen[0]] += 100.0
    scores = score_tokens(hidden, weight, targets, response, RESPONSES, prior_logprobs=overflowing)
    # All tokens of the response whose sums have overflowed.
    assert scores.swept_again == int((response == response[chosen[0]]).sum())


def test_without_a_prior_or_with_tolerance_zero_the_sweep_is_exact():
    hidden, weight, targets, response = inputs()
    exact = score_tokens(hidden, weight, targets, response, RESPONSES)
    prior = torch.full((TOKENS,), -3.0, dtype=torch.float64)
    same = score_tokens(hidden, weight, targets, response, RESPONSES, prior_logprobs=prior, prior_tolerance=0.0)
    assert exact.swept_again is None and same.swept_again is None
    for name in ("logprobs", "entropy", "features"):
        assert torch.equal(getattr(exact, name), getattr(same, name))


def test_no_tokens_and_no_vocabulary_rows_give_zeros():
    hidden, weight, targets, _ = inputs()
    prior = torch.zeros(TOKENS, dtype=torch.float64)
    options = dict(prior_logprobs=prior)
    scores = score_tokens(hidden, weight, targets, torch.full((TOKENS,), -1), RESPONSES, **options)
    assert scores.features.shape == (RESPONSES, HIDDEN) and not scores.features.any() and not scores.logprobs.any()
    empty = score_tokens(hidden[:0], weight, targets[:0], targets[:0], 0, prior_logprobs=prior[:0])
    assert empty.logprobs.shape == (0,) and empty.features.shape == (0, HIDDEN)


def test_a_call_repeated_gives_the_same_bits():
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(600, 32, generator=g), torch.randn(3000, 32, generator=g)
    targets, owner = torch.randint(0, 3000, (600,), generator=g), torch.arange(600) // 100
    prior = score_tokens(hidden, weight, targets, owner, 6).logprobs + torch.randn(600, generator=g) * 2e-3
    first, second = (score_tokens(hidden, weight, targets, owner, 6, prior_logprobs=prior) for _ in range(2))
    assert 0 < first.swept_again < 600
    for name in ("logprobs", "entropy", "features"):
        assert torch.equal(getattr(first, name), getattr(second, name))


class PeakBytes(TorchDispatchMode):
    """The most bytes that storages created inside it have held at the same time."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {StorageWeakRef(x.untyped_storage()) for x in torch.utils._pytree.tree_leaves((args, kwargs))
                  if torch.is_tensor(x)}  # fmt: skip
        result = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(x) and (storage := StorageWeakRef(x.untyped_storage())) not in before:
                self.storages[storage] = x.untyped_storage().nbytes()
        self.storages = {storage: size for storage, size in self.storages.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.storages.values()))
        return result


def test_features_from_a_prior_take_the_memory_of_their_counts_and_nothing_of_complete_rows(monkeypatch):
    monkeypatch.setattr(tiles, "CPU_TILE", 2**12)
    monkeypatch.setattr(tiles, "CPU_COLUMNS", 128)
    g = torch.Generator().manual_seed(4)
    tokens, size, vocabulary, responses = 200, 8, 4000, 3
    hidden, weight = torch.randn(tokens, size, generator=g), torch.randn(vocabulary, size, generator=g)
    targets, owner = torch.randint(0, vocabulary, (tokens,), generator=g), torch.arange(tokens) * responses // tokens
    runs = [(row, int((owner == row).sum())) for row in range(responses)]
    where = dict(runs=runs, chunk_tokens=64)
    prior = score_tokens(hidden, weight, targets, owner, responses, **where).logprobs

    def peak(**options) -> int:
        with PeakBytes() as seen:
            score_tokens(hidden, weight, targets, owner, responses, **where, **options)
        return seen.peak

    counts = 4 * responses * vocabulary
    without = peak(features=False)
    # Vectors over tokens, and Φ itself.
    small = 4 * 8 * tokens + 4 * 4 * responses * (size + 1)
    assert peak(prior_logprobs=prior, prior_tolerance=0.1) <= without + counts + small
    assert peak(prior_logprobs=prior, features=False) <= without + small
    assert peak() > without + counts + 4 * 64 * vocabulary / 2, "the exact sweep keeps complete rows of exponentials"
