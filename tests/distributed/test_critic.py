"""The critic computes the same values and gradients under every layout, and those of transformers with a value head."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layout_cases import TEMPERATURE, sequences, weighted_loss
from small_policy import differing, export, load_policy, message_of, save_policy

from megatron_g2rl.config.sections.model import OptimizerConfig, PolicyConfig

# A different order of fp32 sums: a few units in the last place of numbers of order 1 to 10, over four layers.
TOLERANCE = 2e-5
CLIP = 0.4

LAYOUTS = {
    "tp2": (2, dict(tensor_parallel=2)),
    "tp2_sp": (2, dict(tensor_parallel=2, sequence_parallel=True)),
    "pp2": (2, dict(pipeline_parallel=2)),
    "pp2_interleaved": (2, dict(pipeline_parallel=2, virtual_stages=2)),
    "dp2": (2, dict()),
    "cp2": (2, dict(context_parallel=2)),
    "tp2_pp2_sp": (4, dict(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True)),
    "tp2_cp2_sp": (4, dict(tensor_parallel=2, context_parallel=2, sequence_parallel=True)),
}


def make_critic(folder: str, layout: dict):
    """A policy and a critic whose head is not zero, so that gradients reach all layers."""
    from megatron_g2rl.policy import runtime
    from megatron_g2rl.policy.critic import Critic
    from megatron_g2rl.policy.policy import Policy

    settings = PolicyConfig(**(dict(precision="fp32", device="cpu", head_memory_mb=1) | layout))
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_updates=1)
    started = runtime.start(settings, seed=1)
    shared = dict(temperature=TEMPERATURE, tokens_per_microbatch=40, total_updates=10)
    policy = Policy(folder, settings, optimizer, started, **shared)
    critic = Critic(policy, optimizer.model_copy(update=dict(learning_rate=2e-3)), 20)
    for name, parameter in [pair for chunk in critic.chunks for pair in chunk.named_parameters()]:
        if name.endswith("output_layer.weight"):
            parameter.data.copy_(head_weight(policy.architecture.hidden))
    critic.optimizer.follow_weights()
    return policy, critic


def head_weight(hidden: int) -> torch.Tensor:
    return torch.randn(1, hidden, generator=torch.Generator().manual_seed(2)) / 4


def targets(lengths: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Old values and returns of every token."""
    draw = torch.Generator().manual_seed(7)
    old = [torch.randn(n, generator=draw) for n in lengths]
    return old, [values + torch.randn(len(values), generator=draw) for values in old]


def clipped_loss(lengths: list[int]):
    """The loss of the critic on the sequences of the test."""
    from megatron_g2rl.algorithm import UpdateTotals, value_loss
    from megatron_g2rl.policy.packing import row_mask, rows_of

    old, returns = targets(lengths)
    totals = UpdateTotals(tokens=sum(lengths), responses=len(lengths))

    def loss(values, batch):
        mask = row_mask(batch)
        tables = (rows_of(table, batch, mask) for table in (old, returns))
        return value_loss(values, *tables, mask, CLIP, totals=totals)

    return loss


@torch.no_grad()
def exported(critic) -> dict[str, torch.Tensor]:
    """Complete weights under Hugging Face names, gathered by the code for the policy; the head is `score.weight`."""
    from megatron_g2rl.policy.hf.weights import HFWeights
    from megatron_g2rl.policy.models.families import OUTPUT, Rule

    architecture = critic.policy.architecture
    rules = [
        r if r.megatron != OUTPUT else Rule(OUTPUT, ("score.weight",), "replicated") for r in architecture.family.rules
    ]
    family = replace(architecture.family, rules=tuple(rules))
    critic.gather_parameters()
    view = HFWeights(critic.chunks, replace(architecture, family=family, tied=False))
    return {name: tensor.clone() for name, tensor in view.stream()}


@torch.no_grad()
def gradients(critic) -> dict[str, torch.Tensor]:
    parameters = [p for chunk in critic.chunks for p in chunk.parameters()]
    weights = [p.clone() for p in parameters]
    for p in parameters:
        p.copy_(p.main_grad)
    found = exported(critic)
    for p, weight in zip(parameters, weights, strict=True):
        p.copy_(weight)
    return found


def run_critic(rank: int, folder: str, layout: dict, updates: int = 0):
    """Values, metrics and gradients under a layout, or, with `updates`, the weights after them."""
    policy, critic = make_critic(folder, dict(distributed_optimizer=updates > 0) | layout)
    batch = sequences(policy.architecture.vocab_size)
    before = policy.score(batch, features=False).logprobs
    loss = clipped_loss([len(s.response) for s in batch])
    result = {"values": torch.cat(critic.values(batch))}
    if updates:
        for _ in range(updates):
            outcome, result["metrics"] = critic.update(batch, loss)
            assert outcome.applied
            critic.rest()
            assert not any(buffer.untyped_storage().nbytes() for buffer in critic.optimizer._gradient_buffers())
        result["weights"], result["rate"] = exported(critic), outcome.learning_rate
    else:
        result["metrics"] = critic.accumulate_gradients(batch, loss)
        result["gradients"] = gradients(critic)
    after = policy.score(batch, features=False).logprobs
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    return result if rank == 0 else None


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def compare(found: dict, expected: dict) -> None:
    assert relative(found["values"], expected["values"]) < TOLERANCE
    assert found["metrics"].keys() == expected["metrics"].keys() == {"loss", "clip_fraction"}
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=TOLERANCE), name
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, tensor in expected["gradients"].items():
        assert relative(found["gradients"][name], tensor) < TOLERANCE, f"gradient of {name}"


@pytest.fixture(scope="module")
def one_rank(ranks, model_folder):
    return functools.cache(lambda *key: ranks(1, run_critic, model_folder(*key), {})[0])


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_values_and_gradients_of_one_rank(layout, ranks, model_folder, one_rank):
    world, settings = LAYOUTS[layout]
    compare(ranks(world, run_critic, model_folder("qwen3", True), settings)[0], one_rank("qwen3", True))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        dict(expert_parallel=2),
        dict(expert_parallel=2, tensor_parallel=2, sequence_parallel=True),
        dict(pipeline_parallel=2),
    ],
    ids=["ep2", "tp2_ep2", "pp2"],
)
def test_experts_of_a_critic_can_be_distributed(layout, ranks, model_folder, one_rank):
    compare(ranks(2, run_critic, model_folder("qwen3_moe", False), layout)[0], one_rank("qwen3_moe", False))


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_values_and_gradients_equal_autograd_of_transformers_with_a_value_head(tied, model_folder, one_rank):
    from transformers import AutoModelForCausalLM

    folder = model_folder("qwen3", tied)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).model
    weight = head_weight(model.config.hidden_size).double().requires_grad_()
    batch = sequences(model.config.vocab_size)
    values = []
    for s in batch:
        hidden = model(torch.tensor([s.prompt + s.response])).last_hidden_state[0]
        values.append((hidden @ weight[0])[len(s.prompt) - 1 : -1])
    old, returns = (torch.cat(parts).double() for parts in targets([len(s.response) for s in batch]))
    values = torch.cat(values)
    near = torch.minimum(torch.maximum(values, old - CLIP), old + CLIP)
    loss = torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean() / 2
    loss.backward()
    found = one_rank("qwen3", tied)
    assert relative(found["values"], values.detach()) < TOLERANCE
    assert found["metrics"]["loss"] == pytest.approx(loss.item(), rel=TOLERANCE)
    expected = {f"model.{name}": p.grad for name, p in model.named_parameters()} | {"score.weight": weight.grad}
    assert found["gradients"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative(found["gradients"][name], tensor) < 5 * TOLERANCE, name


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(overlap_communication=True), dict(tensor_parallel=2, sequence_parallel=True)],
    ids=["dp2", "dp2_overlap", "tp2_sp"],
)
def test_updated_weights_do_not_depend_on_the_layout(settings, ranks, model_folder):
    folder = model_folder("qwen3", True)
    expected = ranks(1, run_critic, folder, dict(distributed_optimizer=False), 3)[0]
    found = ranks(2, run_critic, folder, settings | dict(offload_optimizer=True), 3)[0]
    assert found["rate"] == expected["rate"]
    # Adam divides by the root of tiny second moments, which enlarges rounding: 1% of the change by three updates.
    for name, tensor in expected["weights"].items():
        assert (found["weights"][name] - tensor).abs().max() < 6e-5, name


def train(policy, critic, updates: int):
    """Updates of both models; losses of the critic."""
    batch = sequences(policy.architecture.vocab_size)
    loss, losses = clipped_loss([len(s.response) for s in batch]), []
    for _ in range(updates):
        losses.append(critic.update(batch, loss)[1]["loss"])
        critic.rest()
        policy.update(batch, weighted_loss)
    return losses


def save_and_continue(rank: int, folder: str, layout: dict, checkpoints: str):
    from megatron_g2rl.policy.checkpoint.save import Checkpoints

    policy, critic = make_critic(folder, layout)
    train(policy, critic, 3)
    saves = Checkpoints(policy, Path(checkpoints), keep=1, asynchronous=False, critic=critic)
    saves.save(3, {"step": 3})
    return train(policy, critic, 2), exported(critic), export(policy)


def load_and_continue(rank: int, folder: str, layout: dict, checkpoints: str):
    from megatron_g2rl.policy.checkpoint.checkpoints import latest, load

    policy, critic = make_critic(folder, layout)
    train(policy, critic, 1)  # anything else than the weights at the start
    assert load(latest(Path(checkpoints)), policy, critic=critic) == {"step": 3}
    return train(policy, critic, 2), exported(critic), export(policy)


def load_policy_alone(rank: int, folder: str, checkpoints: str):
    """What the checkpoint is for runs without a critic: a model, and a checkpoint of the policy."""
    from megatron_g2rl.policy.checkpoint.checkpoints import latest

    checkpoint = latest(Path(checkpoints))
    policy, critic = make_critic(folder, {})
    load_policy(policy, checkpoint)
    restored = export(policy)
    policy.hf.load(checkpoint)
    assert not differing(export(policy), restored)
    save_policy(policy, Path(checkpoints) / "policy", 3, {"step": 3}, keep=1)
    return message_of(lambda: load_policy(policy, latest(Path(checkpoints) / "policy"), critic=critic))


ONE, TP2, PP2 = {}, dict(tensor_parallel=2, sequence_parallel=True), dict(pipeline_parallel=2)
RESUMES = {
    "one": ((1, ONE), (1, ONE)),
    "dp2_bf16": ((2, dict(precision="bf16")), (2, dict(precision="bf16"))),
    "offloaded": ((1, dict(offload_optimizer=True)), (1, dict(offload_optimizer=True))),
    "interleaved": ((2, PP2 | dict(virtual_stages=2)), (2, PP2 | dict(virtual_stages=2))),
    "tp2-pp2": ((2, TP2), (2, PP2)),
    "dp2-one": ((2, ONE), (1, dict(distributed_optimizer=False))),
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", RESUMES)
def test_policy_and_critic_resume_from_one_checkpoint(case, ranks, model_folder, tmp_path):
    (world, layout), (new_world, new_layout) = RESUMES[case]
    folder = model_folder("qwen3", True)
    losses, *saved = ranks(world, save_and_continue, folder, layout, str(tmp_path))[0]
    new_losses, *loaded = ranks(new_world, load_and_continue, folder, new_layout, str(tmp_path))[0]
    if layout == new_layout:
        assert new_losses == losses
        assert not differing(loaded[0], saved[0]) and not differing(loaded[1], saved[1])
    else:
        # Another layout sums in a different order; see above for Adam.
        assert new_losses == pytest.approx(losses, rel=5e-5)
        assert not differing(loaded[0], saved[0], 6e-5) and not differing(loaded[1], saved[1], 6e-5)


@pytest.mark.distributed
def test_a_checkpoint_with_a_critic_is_one_of_the_policy_and_one_without_is_refused(ranks, model_folder, tmp_path):
    folder = model_folder("qwen3", True)
    ranks(1, save_and_continue, folder, ONE, str(tmp_path))
    message = ranks(1, load_policy_alone, folder, str(tmp_path))[0]
    assert "has no critic" in message and "algorithm.baseline" in message
