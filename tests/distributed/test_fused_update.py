"""A step whose update computes Φ itself equals one with an old-log-prob pass, under every layout that holds groups."""

from __future__ import annotations

import functools

import pytest
import torch
from layout_cases import TEMPERATURE

LENGTHS = [(5, (9, 4, 7)), (3, (1, 12, 6)), (8, (4, 10, 3)), (2, (11, 5, 8))]
"""Prompt tokens and response tokens of each group."""
REWARDS = [1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 1.0, -1.0]
"""The second group stays uniform whatever its novelty; the third is uniform before shaping only."""
ALGORITHM = dict(kl_coefficient=0.1, kl_estimator="k1", entropy_coefficient=0.05, importance_cap=1.2)
"""k1, because at the reference k2 and k3 have no gradient."""


def groups_of(vocab_size: int, reported: list[list[float]] | None):
    """Groups of three random responses each."""
    from megatron_g2rl.records import Prompt, Response, ResponseGroup

    g = torch.Generator().manual_seed(5)
    draw = lambda n: tuple(torch.randint(0, vocab_size, (n,), generator=g).tolist())  # noqa: E731
    made, reported = [], iter(reported or [[-4.0] * n for _, lengths in LENGTHS for n in lengths])
    for i, (prompt, lengths) in enumerate(LENGTHS):
        responses = tuple(Response(draw(n), tuple(next(reported)), "t", "stop", j) for j, n in enumerate(lengths))
        made.append(ResponseGroup(Prompt(i, "p", draw(prompt), "a"), responses))
    return tuple(made)


def start_policy(folder: str, layout: dict, source: str, changes: dict):
    from megatron_g2rl.config import Config
    from megatron_g2rl.policy import runtime
    from megatron_g2rl.policy.policy import Policy

    config = Config(
        model={"path": folder},
        data={"source": "none"},
        policy=dict(precision="fp32", device="cpu", head_memory_mb=1) | layout,
        optimizer=dict(learning_rate=1e-3, warmup_updates=0, gradient_clip=0.5),
        algorithm=ALGORITHM | changes.get("algorithm", {}),
        exploration=dict(source=source, mapping="centered") | changes.get("exploration", {}),
        trainer=dict(prompts_per_step=4, group_size=3, responses_per_update=12),
    )
    started = runtime.start(config.policy, seed=1)
    # Two micro-batches can hold two groups each, most hold one.
    settings = dict(temperature=TEMPERATURE, tokens_per_microbatch=60, total_updates=10, keep_reference=True)
    return config, Policy(folder, config.policy, config.optimizer, started, **settings)


def report_logprobs(rank: int, folder: str):
    """Log-probs as a rollout engine reports them: nearly those of the policy, some far from them."""
    from megatron_g2rl.policy.packing import sequences_of

    _, policy = start_policy(folder, {}, "exact", {})
    exact = policy.score(sequences_of(groups_of(policy.architecture.vocab_size, None)), features=False).logprobs
    reported = [(x + torch.arange(len(x)) % 3 * 2e-4).tolist() for x in exact]
    reported[4][0] += 0.4
    reported[7][1] -= 3.0
    return reported


def make_step(rank: int, folder: str, layout: dict, source: str, changes: dict, reported: list, rewards: list):
    """A step: its experience, metrics, gradients and new weights."""
    from megatron_g2rl.rewards.distribute import ScoredRewards
    from megatron_g2rl.tracking.clock import Clock
    from megatron_g2rl.training.collection import make_experience
    from megatron_g2rl.training.fused_update import FusedUpdate
    from megatron_g2rl.training.providers import InputProviders
    from megatron_g2rl.training.updates import Updates

    config, policy = start_policy(folder, layout, source, changes)
    groups, clock = groups_of(policy.architecture.vocab_size, reported), Clock()
    rewards = torch.tensor(rewards)
    outcome = ScoredRewards(rewards, rewards > 0, {})
    updates, gradients, passes = Updates(config, policy), {}, []
    score, prepare = policy.score, policy.optimizer.megatron.prepare_grads
    policy.score = lambda *args, **options: (passes.append(options["features"]), score(*args, **options))[1]
    policy.optimizer.megatron.prepare_grads = lambda: (gradients.update(gradients_of(policy)), prepare())[1]
    fused = FusedUpdate(config, policy, updates, policy.runtime.world_size)
    if config.exploration.method == "gradient":
        assert fused.applies(groups, outcome) == (source == "auto")
    if source == "auto":
        experience, metrics = fused.run(groups, outcome, clock, 0)
        old = experience.old_statistics
    else:
        experience = make_experience(policy, groups, outcome, config, clock, InputProviders(config))
        plan = updates.plan(experience, 0)
        old, metrics = updates.run(experience, plan, updates.known_statistics(experience, plan), 0)
    # The reference pass is the only one without Φ.
    assert passes == ([False] if source == "auto" else [True, False])
    tensors = {name: getattr(experience, name) for name in ("shaped", "novelty", "advantages", "kept", "features")}
    tensors |= {"logprobs": torch.cat(old.logprobs), "entropy": torch.cat(old.entropy)}
    weights = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    assert experience.exploration_seconds.keys() == {"features", "reduce", "shaping"}
    return dict(tensors=tensors, metrics=metrics, gradients=gradients, weights=weights)


@torch.no_grad()
def gradients_of(policy) -> dict[str, torch.Tensor]:
    """Complete gradients under Hugging Face names."""
    weights = [entry.parameter.clone() for entry in policy.hf.local]
    for entry in policy.hf.local:
        entry.parameter.copy_(entry.parameter.main_grad)
    found = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    for entry, weight in zip(policy.hf.local, weights, strict=True):
        entry.parameter.copy_(weight)
    return found


REPLICATED = dict(distributed_optimizer=False)
"""Every rank has the complete gradients, so that they can be compared."""
CASES = {
    "one": (1, {}, False, {}),
    "tp2": (2, dict(tensor_parallel=2), True, dict(algorithm=dict(aggregation="sequence_mean"))),
    "tp2_sp": (2, dict(tensor_parallel=2, sequence_parallel=True), False, {}),
    "pp2": (2, dict(pipeline_parallel=2), True, {}),
    "pp2_interleaved": (
        *(2, dict(pipeline_parallel=2, virtual_stages=2), False),
        dict(algorithm=dict(drop_uniform_groups=False)),
    ),
    "cp2": (2, dict(context_parallel=2), False, dict(algorithm=dict(ratio="sequence", kl_estimator="k1"))),
    "dp2": (2, {}, False, dict(exploration=dict(mapping="correct_only"))),
    "dp2_without_shaping": (
        *(2, {}, False),
        dict(exploration=dict(method="none", prior_tolerance=0), algorithm=dict(aggregation="sequence_mean_token_sum")),
    ),
    "dp2_sharded": (2, dict(distributed_optimizer=True, overlap_communication=True), False, {}),
    "ep2": (2, dict(expert_parallel=2), False, {}),
    "tp2_pp2_sp": (4, dict(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True), False, {}),
    "cp2_dp2": (4, dict(context_parallel=2), False, {}),
}
"""Ranks, layout, whether embeddings are tied, and changes of the configuration."""


@pytest.fixture(scope="module")
def reported(ranks, model_folder):
    return functools.cache(lambda *key: ranks(1, report_logprobs, model_folder(*key))[0])


@pytest.fixture(scope="module")
def scored(ranks, model_folder, reported):
    """The step with an old-log-prob pass, on one rank, once for each configuration."""
    made = {}

    def make(model: tuple[str, bool], changes: dict):
        key = (model, repr(changes))
        if key not in made:
            arguments = (model_folder(*model), REPLICATED, "exact", changes, reported(*model), REWARDS)
            made[key] = ranks(1, make_step, *arguments)[0]
        return made[key]

    return make


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_a_fused_update_equals_one_after_an_old_log_prob_pass(case, ranks, model_folder, reported, scored):
    world, layout, tied, changes = CASES[case]
    model = ("qwen3_moe" if case == "ep2" else "qwen3", tied)
    arguments = (model_folder(*model), REPLICATED | layout, "auto", changes, reported(*model), REWARDS)
    results = ranks(world, make_step, *arguments)
    expected = scored(model, changes)
    found = results[0]
    dropped = changes.get("algorithm", {}).get("drop_uniform_groups", True)
    shaped = changes.get("exploration", {}).get("method") != "none"
    assert found["tensors"]["kept"].view(4, 3).all(1).tolist() == [True, not dropped, not dropped or shaped, True]
    for name, tensor in expected["tensors"].items():
        # Novelty is stretched to the range of its group, which enlarges rounding errors of Φ.
        close = dict(rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(found["tensors"][name], tensor, **close, msg=lambda text, n=name: f"{n}: {text}")
    assert found["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-3, abs=2e-5), name
    for name, tensor in expected["gradients"].items() if case != "dp2_sharded" else ():
        difference = (found["gradients"][name] - tensor).abs().max() / tensor.abs().max()
        assert difference < 1e-3, f"gradient of {name}"
    for name, tensor in expected["weights"].items():
        # Adam turns differences in the last place of small gradients into larger differences of the weights.
        torch.testing.assert_close(found["weights"][name], tensor, rtol=0, atol=2e-4, msg=name)
    for other in results[1:]:
        assert all(torch.equal(other["tensors"][name], tensor) for name, tensor in found["tensors"].items())
        assert other["metrics"] == found["metrics"]


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{}, dict(pipeline_parallel=2)], ids=["dp2", "pp2"])
def test_a_step_whose_groups_are_all_dropped_makes_no_update(layout, ranks, model_folder, reported):
    folder, rewards = model_folder("qwen3", False), [0.0] * len(REWARDS)
    found, _ = ranks(2, make_step, folder, REPLICATED | layout, "auto", {}, reported("qwen3", False), rewards)
    assert found["metrics"] == {"update/count": 0.0, "update/skipped": 0.0} and not found["gradients"]
    (expected,) = ranks(1, make_step, folder, REPLICATED, "exact", {}, reported("qwen3", False), rewards)
    assert found["metrics"] == expected["metrics"]
    for name, tensor in expected["weights"].items():
        assert torch.equal(found["weights"][name], tensor), name


def fail_in_shaping(rank: int, folder: str, reported: list):
    """The messages of the same error on all ranks, although only the last stage computes the loss."""
    from megatron_g2rl.registry import MAPPINGS, ExtensionError

    MAPPINGS.load = lambda name: lambda scores, rewards: scores.new_tensor([rank])
    try:
        make_step(rank, folder, REPLICATED | dict(pipeline_parallel=2), "auto", {}, reported, REWARDS)
    except ExtensionError as error:
        return str(error)


@pytest.mark.distributed
def test_an_error_in_shaping_is_raised_on_all_ranks(ranks, model_folder, reported):
    first, last = ranks(2, fail_in_shaping, model_folder("qwen3", False), reported("qwen3", False))
    assert "mapping centered must return one finite number per response" in first
    assert "mapping centered must return one finite number per response" in last
