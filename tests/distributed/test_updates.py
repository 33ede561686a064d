"""A step whose first update provides its own old log-probs equals one with an old-log-prob pass over all responses."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from layout_cases import TEMPERATURE, sequences

KEPT = [0, 1, 4, 5]
"""Three groups of two; the second is dropped."""
LAYOUTS = {
    "dp2": dict(),
    "tp2_sp": dict(tensor_parallel=2, sequence_parallel=True),
    "pp2": dict(pipeline_parallel=2),
    "cp2": dict(context_parallel=2),
}


def make_updates(rank: int, folder: str, layout: dict, scored_before: bool, responses_per_update: int):
    """One step of updates: number of responses in the old-log-prob pass, metrics, log-probs and the new weights."""
    from megatron_g2rl.config import Config
    from megatron_g2rl.policy import runtime
    from megatron_g2rl.policy.packing import sequences_of
    from megatron_g2rl.policy.policy import Policy
    from megatron_g2rl.training.updates import Updates

    config = Config(
        model={"path": folder},
        data={"source": "none"},
        policy=dict(precision="fp32", device="cpu", **layout),
        optimizer=dict(learning_rate=1e-3, warmup_updates=0),
        algorithm=dict(kl_coefficient=0.0, importance_cap=1.5, entropy_coefficient=0.01, ratio="sequence"),
        trainer=dict(responses_per_update=responses_per_update, epochs_per_step=2),
    )
    started = runtime.start(config.policy, seed=1)
    settings = dict(temperature=TEMPERATURE, tokens_per_microbatch=40, total_updates=10)
    policy = Policy(folder, config.policy, config.optimizer, started, **settings)
    step = experience(sequences(policy.architecture.vocab_size))
    if scored_before:
        step = replace(step, old_statistics=policy.score(sequences_of(step.groups), features=False))
    updates, seen = Updates(config, policy), []
    plan = updates.plan(step, 3)
    score = policy.score
    policy.score = lambda found, **options: (seen.append(len(found)), score(found, **options))[1]
    old, metrics = updates.run(step, plan, updates.known_statistics(step, plan), 3)
    weights = {name: tensor.clone() for name, tensor in policy.hf_weights()}
    runtime.stop()
    return sum(seen), metrics, torch.cat(old.logprobs), torch.cat(old.entropy), weights


def experience(found):
    """Three groups of two responses to different prompts, without log-probs."""
    from megatron_g2rl.records import Experience, Prompt, Response, ResponseGroup

    responses = [Response(s.response, (-4.0,) * len(s.response), "t", "stop", i) for i, s in enumerate(found)]
    groups = tuple(
        ResponseGroup(Prompt(i, "p", tuple(found[2 * i].prompt), "a"), tuple(responses[2 * i : 2 * i + 2]))
        for i in range(3)
    )
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.0, -0.5, 0.5])
    kept = torch.zeros(6, dtype=torch.bool)
    kept[KEPT] = True
    return Experience(groups, advantages, advantages > 0, advantages, advantages, kept)


@pytest.fixture(scope="module")
def scored_before(ranks, model_folder):
    return functools.cache(lambda size: ranks(1, make_updates, model_folder("qwen3", False), {}, True, size)[0])


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("responses_per_update", [3, 4], ids=["two_updates", "one_update"])
def test_the_log_probs_of_the_first_update_replace_its_part_of_the_old_log_prob_pass(
    layout, responses_per_update, ranks, model_folder, scored_before
):
    arguments = (model_folder("qwen3", False), LAYOUTS[layout], False, responses_per_update)
    seen, metrics, logprobs, entropy, weights = ranks(2, make_updates, *arguments)[0]
    assert seen == 6 - responses_per_update  # the dropped responses, and those of the second update
    none_seen, expected_metrics, *expected, expected_weights = scored_before(responses_per_update)
    assert none_seen == 0
    torch.testing.assert_close(logprobs, expected[0], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(entropy, expected[1], rtol=2e-5, atol=2e-5)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():
        # Adam turns differences in the last place of small gradients into larger differences of the weights.
        assert metrics[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-4, msg=name)
