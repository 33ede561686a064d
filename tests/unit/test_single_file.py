"""examples/g2rl_single_file.py computes what the package computes: Φ, ν, shaped rewards, advantages and the loss."""

from __future__ import annotations

import importlib.util
import random
import re
from types import ModuleType

import pytest
import torch
from loss_keywords import training_loss

from megatron_g2rl.algorithm import group_advantages
from megatron_g2rl.exploration import exploration_scores, geometry, shape_groups
from megatron_g2rl.policy.head import score_tokens

GROUPS, SIZE, LENGTH, HIDDEN, VOCAB = 5, 6, 7, 12, 31
RESPONSES = GROUPS * SIZE
# float64 on both sides: only the order of sums differs.
EXACT = dict(rtol=1e-11, atol=1e-12)


@pytest.fixture(scope="module")
def example(repository) -> ModuleType:
    spec = importlib.util.spec_from_file_location("g2rl_single_file", repository / "examples/g2rl_single_file.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def randn():
    generator = torch.Generator().manual_seed(3)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def mixed_groups(randn) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [P, G, H] and rewards [P, G]: mixed, all correct, all wrong, identical responses, a zero feature."""
    phi = randn(GROUPS, SIZE, HIDDEN)
    rewards = torch.where(randn(GROUPS, SIZE) > 0, 1.0, -1.0).double()
    rewards[1], rewards[2] = 1.0, -1.0
    phi[3] = phi[3, 0]
    phi[4, 2] = 0
    return phi, rewards


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_features_and_log_probs_are_those_of_the_head(example, randn, temperature):
    hidden, head = randn(RESPONSES, LENGTH, HIDDEN), randn(VOCAB, HIDDEN)
    tokens = torch.randint(VOCAB, (RESPONSES, LENGTH), generator=torch.Generator().manual_seed(4))
    lengths = torch.arange(RESPONSES) % (LENGTH + 1)  # of 0 to LENGTH tokens
    mask = torch.arange(LENGTH) < lengths[:, None]
    table, logp = example.token_logprobs(hidden, head, tokens, temperature)
    phi = example.features(table, head, tokens, mask)
    owner = torch.arange(RESPONSES)[:, None].expand_as(mask)
    expected = score_tokens(hidden[mask], head, tokens[mask], owner[mask], RESPONSES, temperature=temperature)
    torch.testing.assert_close(phi, expected.features, **EXACT)
    torch.testing.assert_close(logp[mask], expected.logprobs, **EXACT)


def test_novelty_and_geometry_are_those_of_the_package(example, randn):
    phi, rewards = mixed_groups(randn)
    nu, _ = example.novelty(phi, rewards)
    for group in range(GROUPS):
        # The root turns a rounding error of 1e-16 into 1e-8 where ν is zero (identical responses).
        torch.testing.assert_close(nu[group], exploration_scores(phi[group], rewards[group]), rtol=1e-11, atol=5e-8)
    _, mean_cosine = example.novelty(phi[:-1], rewards[:-1])  # the package excludes the zero feature of the last one
    expected = [geometry(features).mean_cosine for features in phi[:-1]]
    assert mean_cosine.item() == pytest.approx(sum(expected) / len(expected), abs=1e-12)


@pytest.mark.parametrize("strength", [0.0, 0.5, 4.0])
def test_shaped_rewards_and_advantages_are_those_of_the_package(example, randn, strength):
    phi, rewards = mixed_groups(randn)
    shaped = example.shape_rewards(rewards, example.novelty(phi, rewards)[0], strength)
    group = torch.arange(GROUPS).repeat_interleave(SIZE)
    expected, _ = shape_groups(phi.flatten(0, 1), rewards.flatten(), group, strength=strength)
    torch.testing.assert_close(shaped.flatten(), expected, **EXACT)
    assert (strength == 0) == torch.equal(shaped, rewards)
    assert strength < 4 or shaped.abs().max() == 3  # the bound is active
    advantages = example.group_advantages(shaped)
    torch.testing.assert_close(advantages.flatten(), group_advantages(expected, group), **EXACT)
    assert not advantages[3].any() or rewards[3].unique().numel() > 1  # identical responses, equal rewards


def test_loss_and_its_gradient_are_those_of_the_package(example, randn):
    old, advantages = randn(RESPONSES, LENGTH) - 3, randn(RESPONSES)
    logp = (old + 0.6 * randn(RESPONSES, LENGTH)).requires_grad_()  # ratios on both sides of 0.8, 1.2 and 3
    # Below the 2.6 nats at which the package clamps the estimate; the example does not clamp.
    reference = logp.detach() + 0.5 * randn(RESPONSES, LENGTH)
    assert (reference - logp).abs().max() < 2.6
    mask = randn(RESPONSES, LENGTH) > -1
    ratio = (logp - old).exp()
    assert ((ratio > 3) & (advantages < 0)[:, None]).any() and (ratio < 0.8).any()
    loss = example.policy_loss(logp, old, reference, advantages, mask, kl_coefficient=0.1)
    expected, _ = training_loss(logp, old, advantages, mask, reference_logprobs=reference, kl_coefficient=0.1)
    torch.testing.assert_close(loss, expected, **EXACT)
    gradients = [torch.autograd.grad(value, logp)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, **EXACT)


def test_log_probs_of_response_tokens_are_those_of_transformers(example):
    torch.manual_seed(5)
    model, rng = example.make_model(layers=2).double(), random.Random(6)
    rows = [example.encode(prompt + response) for prompt, _, response in (example.make_problem(rng) for _ in range(4))]
    rows[0] = rows[0][:-1] + [7] * 3  # one without an end token
    width = max(map(len, rows))
    ids = torch.tensor([row + [example.END] * (width - len(row)) for row in rows], device=example.DEVICE)
    with torch.no_grad():
        hidden, tokens, mask = example.read(model, ids)
        _, logp = example.token_logprobs(hidden, model.lm_head.weight, tokens)
        for row, kept, values in zip(rows, mask, logp, strict=True):
            logits = model(torch.tensor([row], device=example.DEVICE)).logits[0]
            expected = logits.log_softmax(-1)[range(example.PROMPT - 1, len(row) - 1), row[example.PROMPT :]]
            # The end token counts, the prompt and padding do not. float64: padding changes only the order of sums.
            torch.testing.assert_close(values[kept][: len(expected)], expected, rtol=1e-9, atol=1e-10)
            assert kept.sum() == len(expected) or row is rows[0]


def test_only_the_correct_boxed_answer_at_the_end_is_rewarded(example):
    rng = random.Random(7)
    for prompt, answer, response in (example.make_problem(rng) for _ in range(200)):
        steps = [prompt, *response.partition("\\boxed")[0].strip("=").split("=")]
        assert {sum(map(int, step.split("+"))) for step in steps} == {answer}
        tokens = example.encode(response)
        assert example.verify(tokens, answer) == 1.0
        assert example.verify(tokens + [example.END, example.END], answer) == 1.0
        assert example.verify(tokens, answer + 1) == example.verify(tokens[:-2], answer) == -1.0
        assert example.verify([*tokens[:-1], *example.encode("+1<end>")], answer) == -1.0


def test_the_sections_that_the_example_refers_to_contain_these_equations(repository):
    headings = re.findall(
        r"^## (\d+)\. .*\(equations (\d+)-(\d+)\)$", (repository / "docs/method.md").read_text(), re.M
    )
    sections = {int(number): range(int(first), int(last) + 1) for number, first, last in headings}
    text = (repository / "examples/g2rl_single_file.py").read_text()
    cited = re.findall(r"section (\d+), equations? (\d+)(?:-(\d+))?", text)
    assert len(cited) == 5
    for number, first, last in cited:
        assert {int(first), int(last or first)} <= set(sections[int(number)])
