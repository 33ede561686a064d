"""The loss of micro-batches of complete groups, in float64, and the runs and steps that use it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_g2rl.algorithm import AGGREGATIONS
from megatron_g2rl.config import Config
from megatron_g2rl.config.feature_pass import update_cannot_compute_features
from megatron_g2rl.data.batching import plan_groups
from megatron_g2rl.policy.packing import pack, row_mask, sequences_of
from megatron_g2rl.records import Prompt, Response, ResponseGroup, group_ids, responses_of
from megatron_g2rl.rewards.distribute import ScoredRewards
from megatron_g2rl.training.collection import join_signals, learning_signals
from megatron_g2rl.training.fused_update import AGGREGATED, FusedUpdate, GroupLoss, rescaling, step_inputs
from megatron_g2rl.training.updates import update_loss

SIZES = [
    ((3, 1, 5), (1.0, -1.0, -1.0)),
    ((2, 4), (0.0, 0.0)),
    ((6, 2, 2, 7), (1.0, 1.0, 1.0, 1.0)),
    ((4, 0), (-1.0, 1.0)),
]
"""Response tokens and rewards of each group; the second stays uniform. One response is empty."""
TRUNCATED = 7
"""Length of the response that is truncated."""
SUMMED = dict(rtol=1e-12, atol=1e-14)
"""The same float64 terms in another order."""


def config(**changes) -> Config:
    sections = dict(
        trainer=dict(prompts_per_step=4, group_size=4, responses_per_update=16),
        rollout=dict(max_response_tokens=100),
        data=dict(source="none", max_prompt_tokens=28),
    )
    for name, section in changes.items():
        sections[name] = sections.get(name, {}) | section
    return Config(model={"path": "none"}, **sections)


def step():
    """Groups of the step, their rewards, and what a forward pass yields for each response, in float64."""
    draw = torch.Generator().manual_seed(0)
    groups, tables = [], []
    for i, (lengths, _) in enumerate(SIZES):
        responses = []
        for j, n in enumerate(lengths):
            logprobs, entropy, noise = torch.randn(3, n, generator=draw, dtype=torch.float64)
            reported, ending = tuple((logprobs + 0.1 * noise).tolist()), "length" if n == TRUNCATED else "stop"
            responses.append(Response((5,) * n, reported, "", ending, j))
            tables.append((logprobs, entropy.abs()))
        groups.append(ResponseGroup(Prompt(i, "", (1, 2), ""), tuple(responses)))
    rewards = torch.tensor([reward for _, group in SIZES for reward in group])
    features = torch.randn(len(rewards), 6, generator=draw, dtype=torch.float64)
    reference = tuple((logprobs - 0.2).float() for logprobs, _ in tables)
    return tuple(groups), rewards, tables, features, reference


def summed(batches, tables, loss) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Metrics and gradients of all log-probs and entropies, summed over micro-batches."""
    leaves = [(logprobs.clone().requires_grad_(), entropy.clone().requires_grad_()) for logprobs, entropy in tables]
    metrics: dict[str, float] = {}
    for batch in batches:
        rows = []
        for kind in (0, 1):
            pad = [
                torch.nn.functional.pad(leaves[i][kind], (0, batch.width - len(leaves[i][kind]))) for i in batch.sources
            ]
            rows.append(torch.stack(pad))
        value, own = loss(*rows, batch)
        value.backward()
        for name, part in (own | {"loss": value.detach()}).items():
            metrics[name] = metrics.get(name, 0.0) + float(part)
    zeros = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for pair in leaves for leaf in pair]
    return metrics, zeros


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("dropped", [True, False], ids=["uniform_dropped", "uniform_kept"])
@pytest.mark.parametrize("masked", [True, False], ids=["truncated_masked", "truncated_kept"])
def test_groups_that_shape_their_own_rewards_sum_to_the_update_of_the_kept_responses(
    aggregation, ratio, dropped, masked
):
    groups, rewards, tables, features, reference = step()
    algorithm = dict(kl_coefficient=0.3, kl_estimator="k1", entropy_coefficient=0.2, importance_cap=1.05)
    algorithm |= dict(aggregation=aggregation, ratio=ratio, drop_uniform_groups=dropped)
    if masked:
        algorithm |= dict(mask_truncated_responses=True, overlong_buffer_tokens=97)
        algorithm |= dict(importance_level="sequence", rejection_bounds=(0.8, 1.2))
    c = config(algorithm=algorithm)
    sequences, sizes = sequences_of(groups), [len(group.responses) for group in groups]
    fused_loss = GroupLoss(c, groups, ScoredRewards(rewards, rewards > 0, {}), reference, None)

    def fused(logprobs, entropy, batch):
        return fused_loss(logprobs, entropy, features[list(batch.sources)], batch)

    (plan,) = plan_groups([s.length for s in sequences], sizes, 1, 25)
    assert len(plan) > 1
    found, gradients = summed([pack(sequences, rows) for rows in plan], tables, fused)

    outcome = ScoredRewards(rewards, rewards > 0, {})
    signals = learning_signals(step_inputs(outcome, group_ids(groups), features, c), responses_of(groups), c)
    experience = join_signals(groups, outcome, features, {}, None, reference, signals)
    members = experience.kept.nonzero().squeeze(1).tolist()
    # by the over-long penalty, responses of different lengths have different rewards
    assert len(members) == len(rewards) - (1 if masked else 2 * dropped)
    row_loss = update_loss(c.algorithm, experience, members, None, None)
    kept = [sequences[i] for i in members]
    batches = [pack(kept, rows) for rows in (range(4), range(4, len(members)))]
    expected, own = summed(batches, [tables[i] for i in members], row_loss)

    of_tokens, of_loss = rescaling(experience, aggregation)
    assert (of_tokens == of_loss == 1) == (not dropped and not masked)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        scale = of_loss if name in AGGREGATED else of_tokens
        assert scale * value == pytest.approx(expected[name], rel=1e-12, abs=1e-14), name
    for i in range(len(rewards)):
        for kind in (0, 1):
            gradient = gradients[2 * i + kind] * of_loss
            if i in members:
                torch.testing.assert_close(gradient, own[2 * members.index(i) + kind], **SUMMED)
            else:
                assert not gradient.any()


def test_an_error_of_shaping_is_kept_until_the_pass_is_over():
    groups, rewards, tables, features, _ = step()
    features[0, 0] = torch.nan
    outcome = ScoredRewards(rewards, rewards > 0, {})
    loss = GroupLoss(config(algorithm=dict(kl_coefficient=0.0)), groups, outcome, None, None)
    batch = pack(sequences_of(groups), [0, 1, 2])
    zeros = torch.zeros(3, batch.width, requires_grad=True)
    loss(zeros, zeros, features[:3], batch)
    with pytest.raises(ValueError, match="not finite"):
        loss.check()


def test_a_micro_batch_without_groups_has_no_loss():
    groups, rewards, _, features, _ = step()
    outcome = ScoredRewards(rewards, rewards > 0, {})
    loss = GroupLoss(config(algorithm=dict(kl_coefficient=0.0)), groups, outcome, None, None)
    batch = pack(sequences_of(groups), [])
    nothing = torch.zeros(0, 0, requires_grad=True)
    value, metrics = loss(nothing, nothing, features[:0], batch)
    value.backward()
    loss.check()
    assert value == 0 and not any(metrics.values()) and not row_mask(batch).numel()


@pytest.mark.parametrize(
    ("changes", "ranks", "reason"),
    [
        ({}, 1, None),
        ({}, 4, None),
        (dict(policy=dict(tensor_parallel=2, context_parallel=2)), 8, None),
        (dict(exploration=dict(method="none")), 1, None),
        (dict(exploration=dict(source="exact")), 1, "exploration.source=exact"),
        (dict(trainer=dict(responses_per_update=8)), 1, "2 updates per step"),
        (dict(trainer=dict(epochs_per_step=2)), 1, "2 updates per step"),
        (dict(algorithm=dict(dynamic_sampling_rounds=1)), 1, "algorithm.dynamic_sampling_rounds=1"),
        (dict(algorithm=dict(baseline="critic")), 1, "algorithm.baseline=critic"),
        (dict(algorithm=dict(use_kl_in_reward=True)), 1, "algorithm.use_kl_in_reward=true"),
        ({}, 3, "4 groups on 3 data-parallel ranks"),
        ({}, 8, "4 groups on 8 data-parallel ranks"),
    ],
)
def test_updates_compute_features_where_a_step_has_one_update_and_groups_are_balanced(changes, ranks, reason):
    found = update_cannot_compute_features(config(**changes), ranks)
    assert (found is None) if reason is None else found.startswith(reason)


@pytest.mark.parametrize(
    ("context_parallel", "budget", "expected"), [(1, 21, True), (1, 20, False), (2, 24, True), (2, 23, False)]
)
def test_a_step_applies_if_its_largest_group_fits_with_padding(context_parallel, budget, expected):
    groups, rewards, *_ = step()
    runtime = SimpleNamespace(tensor_size=1, context_size=context_parallel)
    settings = SimpleNamespace(sequence_parallel=False)
    policy = SimpleNamespace(runtime=runtime, settings=settings, tokens_per_microbatch=budget)
    # The third group: 7, 3, 3 and 8 tokens, as the last one of a response is not read; under CP, multiples of 4.
    outcome = ScoredRewards(rewards, rewards > 0, {})
    assert FusedUpdate(config(), policy, None, 1).applies(groups, outcome) == expected
    assert not FusedUpdate(config(exploration=dict(source="exact")), policy, None, 1).applies(groups, outcome)


def test_where_it_is_known_before_that_more_than_a_third_is_dropped_a_step_has_a_pass():
    groups, rewards, *_ = step()  # 5 of 11 responses are in groups with different rewards, 4 in a correct group
    runtime = SimpleNamespace(tensor_size=1, context_size=1)
    policy = SimpleNamespace(runtime=runtime, settings=SimpleNamespace(sequence_parallel=False))
    policy.tokens_per_microbatch = 100
    unshaped = dict(method="gradient", uniform_groups="base")
    for exploration, dropped, expected in (
        (dict(method="none"), True, False),
        (dict(method="none"), False, True),
        (dict(mapping="centered"), True, True),
        (dict(mapping="correct_only"), True, True),
        (unshaped, True, False),
        (unshaped, False, True),
    ):
        c = config(exploration=exploration, algorithm=dict(drop_uniform_groups=dropped))
        outcome = ScoredRewards(rewards, rewards > 0, {})
        assert FusedUpdate(c, policy, None, 1).applies(groups, outcome) == expected
    rewards[5:9] = -1.0  # only 5 of 11 are in groups with a correct response
    outcome = ScoredRewards(rewards, rewards > 0, {})
    assert not FusedUpdate(config(), policy, None, 1).applies(groups, outcome)
    masked = config(exploration=dict(mapping="centered"), algorithm=dict(mask_truncated_responses=True))
    for c in (config(exploration=dict(mapping="centered")), config(algorithm=dict(drop_uniform_groups=False)), masked):
        assert FusedUpdate(c, policy, None, 1).applies(groups, outcome)
    rewards[5] = 1.0  # the large group is no longer uniform: 9 of 11
    c = config(exploration=dict(method="none"))
    assert FusedUpdate(c, policy, None, 1).applies(groups, ScoredRewards(rewards, rewards > 0, {}))
