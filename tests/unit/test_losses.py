"""The losses follow docs/method.md, section 4, on hand-computed examples, and their gradients are correct."""

from __future__ import annotations

import math

import pytest
import torch
from loss_keywords import training_loss
from torch import Tensor

from megatron_g2rl.algorithm import (
    AGGREGATIONS,
    policy_loss,
    supervised_loss,
)

# float64 arithmetic of a few operations on numbers of order one
EXACT = {"rtol": 0, "atol": 1e-14}


def double(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_token(ratio: float, advantage: float, **options) -> tuple[float, float, dict[str, Tensor]]:
    """Loss of one token at a given ratio, its gradient with respect to the log-probability, and the metrics."""
    logprobs = double([math.log(ratio) - 1]).requires_grad_()
    loss, metrics = policy_loss(
        logprobs, double([-1.0]), double(advantage), torch.ones(1, 1, dtype=torch.bool), **options
    )
    loss.backward()
    return loss.item(), logprobs.grad.item(), metrics


def batch(seed: int = 0, responses: int = 5, tokens: int = 6) -> dict[str, Tensor]:
    """Random float64 inputs; responses of several lengths, the second one empty."""
    draw = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(responses, tokens, dtype=torch.float64, generator=draw)

    lengths = torch.randint(1, tokens + 1, (responses,), generator=draw)
    lengths[1] = 0
    old = -normal().abs()
    return {
        "logprobs": old + 0.5 * normal(),
        "old_logprobs": old,
        "advantages": torch.randn(responses, dtype=torch.float64, generator=draw),
        "mask": torch.arange(tokens)[None] < lengths[:, None],
        "reference_logprobs": old + 0.3 * normal(),
        "entropy": normal().abs(),
        "importance_weights": normal().exp().clamp(max=2),
    }


# --- the clipped loss of one token ----------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, expected, gradient",
    [
        # -min(ρ A, clip(ρ, 0.8, 1.2) A); the gradient is -ρ A, or 0 where the clipped side is the smaller
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 1.0, -1.2, 0.0),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (2.9, -1.0, 2.9, 2.9),
        # the dual clip: never above 3 |A| for A < 0
        (5.0, -1.0, 3.0, 0.0),
        (5.0, -2.0, 6.0, 0.0),
        (5.0, 1.0, -1.2, 0.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_loss_of_one_token(ratio, advantage, expected, gradient):
    loss, slope, _ = one_token(ratio, advantage)
    assert loss == pytest.approx(expected, abs=1e-14)
    assert slope == pytest.approx(gradient, abs=1e-14)


def test_without_the_dual_clip_a_negative_advantage_is_not_bounded():
    assert one_token(5.0, -1.0, dual_clip=None)[:2] == (pytest.approx(5.0), pytest.approx(5.0))


def test_clip_higher_widens_the_upper_side_only():
    assert one_token(1.25, 1.0, clip_high=0.28)[0] == pytest.approx(-1.25)
    assert one_token(1.5, 1.0, clip_high=0.28)[0] == pytest.approx(-1.28)
    assert one_token(0.5, -1.0, clip_high=0.28)[0] == pytest.approx(0.8)
    assert one_token(0.75, -1.0, clip_low=0.3)[0] == pytest.approx(0.75)
    assert one_token(1.25, 1.0, clip_high=0.28)[2]["clip_fraction_high"] == 0
    assert one_token(0.75, -1.0, clip_low=0.3)[2]["clip_fraction_low"] == 0


def test_metrics_count_each_kind_of_clipping():
    names = ("clip_fraction_low", "clip_fraction_high", "dual_clip_fraction")
    for ratio, advantage, expected in [
        (0.5, -1, (1, 0, 0)),
        (0.5, 1, (0, 0, 0)),
        (1.5, 1, (0, 1, 0)),
        (1.5, -1, (0, 0, 0)),
        (5.0, -1, (0, 0, 1)),
        (5.0, 1, (0, 1, 0)),
    ]:
        metrics = one_token(ratio, advantage)[2]
        assert tuple(metrics[name].item() for name in names) == expected
    assert one_token(5.0, -1, dual_clip=None)[2]["dual_clip_fraction"] == 0


def test_metrics_of_the_ratio_are_token_means_without_gradient():
    logprobs = double([math.log(2.0), 0.0], [math.log(0.5), 9.0]).requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    _, metrics = policy_loss(logprobs, torch.zeros_like(logprobs), double(1, -1), mask)
    assert metrics["ratio_mean"].item() == pytest.approx((2 + 1 + 0.5) / 3)
    assert metrics["approx_kl"].item() == pytest.approx(((2 - 1 - math.log(2)) + 0 + (0.5 - 1 + math.log(2))) / 3)
    assert not any(value.requires_grad for value in metrics.values())


def test_log_ratio_is_clamped_so_that_the_loss_stays_finite():
    logprobs = torch.tensor([[0.0, -500.0]], requires_grad=True)
    loss, metrics = policy_loss(
        logprobs, torch.tensor([[-500.0, 0.0]]), torch.tensor([-1.0]), torch.ones(1, 2).bool(), dual_clip=None
    )
    loss.backward()
    assert loss.item() == pytest.approx((math.exp(20) + 0.8) / 2, rel=1e-6)
    assert logprobs.grad.tolist() == [[0, 0]]
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_value_on_a_response_token_reaches_the_loss(fault):
    inputs = {name: batch()[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")}
    inputs["logprobs"][0, 0] = fault
    assert policy_loss(**inputs)[0].isnan()


# --- the sequence ratio ---------------------------------------------------------------------------


def test_sequence_ratio_is_the_geometric_mean_over_the_response():
    # log-ratios 0.1, 0.3 (mean 0.2) and 0.3, 0.3 (clipped at 1.3) and the third column is padding
    logprobs = double([0.1, 0.3, 7.0], [0.3, 0.3, 7.0]).requires_grad_()
    mask = torch.tensor([[True, True, False]] * 2)
    loss, metrics = policy_loss(
        logprobs, torch.zeros_like(logprobs), double(1, 1), mask, ratio="sequence", clip_high=0.3
    )
    assert loss.item() == pytest.approx(-(math.exp(0.2) + 1.3) / 2, abs=1e-14)
    assert metrics["ratio_mean"].item() == pytest.approx((math.exp(0.2) + math.exp(0.3)) / 2)
    loss.backward()
    # both tokens of the first response have half of its gradient; each is a quarter of all tokens
    slope = -math.exp(0.2) / 4
    torch.testing.assert_close(logprobs.grad, double([slope, slope, 0], [0, 0, 0]), **EXACT)


# --- gradients and dtypes -------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_gradient_equals_finite_differences(aggregation, ratio):
    inputs = batch(3)
    weights, entropy, logprobs = inputs.pop("importance_weights"), inputs.pop("entropy"), inputs.pop("logprobs")

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        options = {"kl_coefficient": 0.3, "entropy_coefficient": 0.2, "aggregation": aggregation, "ratio": ratio}
        return training_loss(logprobs, entropy=entropy, importance_weights=weights, **inputs, **options)[0]

    assert torch.autograd.gradcheck(loss, (logprobs.requires_grad_(), entropy.requires_grad_()))


def test_gradient_flows_through_the_log_probabilities_only():
    inputs = batch()
    leaves = {name: value.requires_grad_() for name, value in inputs.items() if name not in ("mask", "entropy")}
    training_loss(**inputs, kl_coefficient=0.1)[0].backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {"logprobs"}


def test_at_the_first_update_the_gradient_is_the_policy_gradient():
    # ratio 1 exactly: nothing is clipped, and the gradient of the loss is -A / tokens
    inputs = batch()
    logprobs = inputs["old_logprobs"].clone().requires_grad_()
    loss, metrics = policy_loss(logprobs, inputs["old_logprobs"], inputs["advantages"], inputs["mask"])
    loss.backward()
    expected = -inputs["advantages"][:, None] * inputs["mask"] / inputs["mask"].sum()
    torch.testing.assert_close(logprobs.grad, expected, **EXACT)
    assert metrics["ratio_mean"].item() == pytest.approx(1, abs=1e-15)
    assert metrics["approx_kl"] == 0 and metrics["clip_fraction_low"] == 0 and metrics["clip_fraction_high"] == 0


def test_low_precision_inputs_are_computed_in_float32():
    narrow = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch().items()}
    wide = {name: value.float() if value.is_floating_point() else value for name, value in narrow.items()}
    loss, metrics = training_loss(**narrow, kl_coefficient=0.1)
    assert loss.dtype == torch.float32 and all(value.dtype == torch.float32 for value in metrics.values())
    assert loss == training_loss(**wide, kl_coefficient=0.1)[0]


def test_advantages_may_be_given_for_each_token():
    inputs = {name: batch()[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")}
    expected, _ = policy_loss(**inputs)
    inputs["advantages"] = inputs["advantages"][:, None].expand(-1, inputs["mask"].shape[1])
    assert policy_loss(**inputs)[0] == expected


# --- the other terms ------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation, per_token", [("token_mean", 1 / 3), ("sequence_mean", None)])
def test_kl_and_entropy_terms_have_the_correct_sign_and_weight(aggregation, per_token):
    # advantages zero leave the two terms; policy probability twice the reference's: k1 = ln 2 at every token
    logprobs = torch.full((2, 2), math.log(0.5), dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    entropy = double([1, 2], [4, 99])
    loss, metrics = training_loss(
        logprobs,
        logprobs,
        double(0, 0),
        mask,
        entropy=entropy,
        reference_logprobs=logprobs - math.log(2),
        kl_coefficient=0.1,
        kl_estimator="k1",
        entropy_coefficient=0.01,
        aggregation=aggregation,
    )
    mean_entropy = (1 + 2 + 4) / 3 if per_token else ((1 + 2) / 2 + 4) / 2
    assert loss.item() == pytest.approx(0.1 * math.log(2) - 0.01 * mean_entropy, abs=1e-14)
    # metrics are token means for any aggregation
    assert metrics["kl"].item() == pytest.approx(math.log(2)) and metrics["entropy"].item() == pytest.approx(7 / 3)
    assert metrics["policy_loss"] == 0


def test_terms_with_coefficient_zero_are_logged_and_not_trained():
    inputs = batch()
    inputs["logprobs"].requires_grad_()
    entropy = inputs["entropy"].requires_grad_()
    loss, metrics = training_loss(**inputs)
    loss.backward()
    assert entropy.grad is None and metrics["kl"] > 0 and metrics["entropy"] > 0
    assert loss.detach() == metrics["policy_loss"]


def test_supervised_loss_equals_cross_entropy_of_torch():
    logits = torch.randn(3, 5, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    expected = torch.nn.functional.cross_entropy(logits[mask], targets[mask])
    logprobs = torch.distributions.Categorical(logits=logits).log_prob(targets)
    loss, metrics = supervised_loss(logprobs, mask)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0], **EXACT)
    assert metrics["negative_log_likelihood"] == loss.detach()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"old_logprobs": torch.zeros(5, 7)}, r"old_logprobs \[5, 7\]"),
        ({"mask": torch.ones(6)}, r"mask \[6\]"),
        ({"advantages": torch.zeros(6)}, r"advantages \[6\] must be one for each response or"),
        ({"ratio": "word"}, "unknown ratio 'word': choose token or sequence"),
        ({"aggregation": "median"}, "unknown aggregation 'median'.*token_mean, sequence_mean"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"entropy": None, "entropy_coefficient": 0.1}, "entropy_coefficient is 0.1 but there is no entropy"),
        ({"reference_logprobs": None, "kl_coefficient": 0.1}, "kl_coefficient is 0.1 but there are no reference"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_invalid_input_is_refused_with_the_reason(change, message):
    with pytest.raises(ValueError, match=message):
        training_loss(**{**batch(), **change})
