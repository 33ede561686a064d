"""Training resumes from saved weights, optimizer and schedule under any layout as if it had not been interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layout_cases import sequences, weighted_loss
from small_policy import differing, export, load_policy, make_policy, open_checkpoints, save_policy, train
from torch.utils._python_dispatch import TorchDispatchMode


def save_and_continue(rank: int, folder: str, layout: dict, checkpoints: str):
    policy = make_policy(folder, layout)
    train(policy, 3)
    save_policy(policy, Path(checkpoints), 3, {"step": 3, "cursor": 48}, keep=2)
    return train(policy, 3), export(policy)


def load_and_continue(rank: int, folder: str, layout: dict, checkpoints: str):
    from megatron_g2rl.policy.checkpoint.checkpoints import latest

    policy = make_policy(folder, layout)
    state = load_policy(policy, latest(Path(checkpoints)))
    assert state == {"step": 3, "cursor": 48}
    return train(policy, 3), export(policy)


ONE, TP2, PP2, DP2 = {}, dict(tensor_parallel=2, sequence_parallel=True), dict(pipeline_parallel=2), {}
VPP2 = dict(pipeline_parallel=2, virtual_stages=2)
UNEVEN = dict(pipeline_parallel=2, pipeline_layout="3,1")
BF16 = dict(precision="bf16")
REPLICATED = dict(distributed_optimizer=False)


@pytest.mark.parametrize(
    "saved, loaded",
    [
        ((1, ONE), (1, ONE)),
        ((2, DP2), (2, DP2)),
        ((2, BF16), (2, BF16)),
        ((1, REPLICATED), (1, REPLICATED)),
        ((2, TP2), (1, ONE)),
        ((2, TP2), (2, PP2)),
        ((2, PP2), (2, DP2)),
        ((2, UNEVEN), (2, PP2)),
        ((2, VPP2), (2, VPP2)),
        ((2, DP2), (2, TP2)),
        ((2, DP2), (1, ONE)),
        ((2, REPLICATED), (2, DP2)),
        ((2, DP2), (1, REPLICATED)),
        ((2, BF16), (2, BF16 | REPLICATED)),
    ],
    ids=[
        "one",
        "dp2",
        "bf16_dp2",
        "replicated",
        "tp2-one",
        "tp2-pp2",
        "pp2-dp2",
        "uneven-pp2",
        "interleaved",
        "dp2-tp2",
        "dp2-one",
        "replicated-distributed",
        "distributed-replicated",
        "bf16-replicated",
    ],
)
def test_training_resumes_as_if_it_had_not_been_saved(saved, loaded, ranks, model_folder, tmp_path):
    folder = model_folder("qwen3", True)
    (losses, rates), weights = ranks(saved[0], save_and_continue, folder, saved[1], str(tmp_path))[0]
    (new_losses, new_rates), new_weights = ranks(loaded[0], load_and_continue, folder, loaded[1], str(tmp_path))[0]
    assert new_rates == rates
    if saved == loaded:
        assert new_losses == losses
        assert all(torch.equal(new_weights[name], weights[name]) for name in weights)
    else:
        # Another layout sums in a different order (see test_layouts).
        assert new_losses == pytest.approx(losses, rel=2e-5)
        for name in weights:
            assert (new_weights[name] - weights[name]).abs().max() < 3e-5, name


TP2_PP2 = dict(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True)


def test_a_checkpoint_of_four_ranks_loads_under_every_smaller_layout(ranks, model_folder, tmp_path):
    """Losses and weights agree up to the effect of fp32 summation order over three updates (see test_layouts)."""
    folder = model_folder("qwen3", True)
    (losses, rates), weights = ranks(4, save_and_continue, folder, TP2_PP2, str(tmp_path))[0]
    for world, layout in [(1, ONE), (2, TP2), (2, PP2)]:
        (new_losses, new_rates), new_weights = ranks(world, load_and_continue, folder, layout, str(tmp_path))[0]
        assert new_rates == rates
        assert new_losses == pytest.approx(losses, rel=2e-5)
        assert not differing(new_weights, weights, tolerance=3e-5)


def settings_after_three_updates(rank: int, folder: str, layout: dict, checkpoints: str | None):
    from megatron_g2rl.policy.checkpoint.checkpoints import latest

    policy = make_policy(folder, layout, learning_rate=5e-3, min_learning_rate=1e-3, weight_decay=0.3, beta2=0.5)
    if checkpoints:
        load_policy(policy, latest(Path(checkpoints)))
    else:
        train(policy, 3)
    rates = train(policy, 3)[1]
    keys = ("betas", "eps", "lr", "weight_decay")
    return rates, sorted(tuple(group[key] for key in keys) for group in policy.optimizer.megatron.param_groups)


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "replicated"])
def test_changed_optimizer_settings_apply_after_the_resume(distributed, ranks, model_folder, tmp_path):
    folder, layout = model_folder("qwen3", True), dict(distributed_optimizer=distributed)
    ranks(1, save_and_continue, folder, layout, str(tmp_path))
    fresh = ranks(1, settings_after_three_updates, folder, layout, None)
    assert ranks(1, settings_after_three_updates, folder, layout, str(tmp_path)) == fresh


def save_before_a_step(rank: int, folder: str, layout: dict, checkpoints: str):
    policy = make_policy(folder, layout)
    save_policy(policy, Path(checkpoints), 3, {"step": 3, "cursor": 48}, keep=2)
    return train(policy, 3), export(policy)


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "replicated"])
def test_an_optimizer_without_a_step_is_saved_too(distributed, ranks, model_folder, tmp_path):
    folder, layout = model_folder("qwen3", True), dict(distributed_optimizer=distributed)
    numbers, weights = ranks(1, save_before_a_step, folder, layout, str(tmp_path))[0]
    again, loaded = ranks(1, load_and_continue, folder, layout, str(tmp_path))[0]
    assert again == numbers
    assert not differing(loaded, weights)


def load_under_layers_with_extra_state(rank: int, folder: str, layout: dict, checkpoints: str):
    from megatron_g2rl.policy.specs import TorchRMSNorm

    # Transformer Engine's norms have extra state, torch's do not.
    TorchRMSNorm.get_extra_state = lambda self: torch.empty(0, dtype=torch.uint8)
    TorchRMSNorm.set_extra_state = lambda self, state: None
    return load_and_continue(rank, folder, layout, checkpoints)


def test_layers_whose_extra_state_is_missing_from_the_checkpoint_load_its_weights(ranks, model_folder, tmp_path):
    folder = model_folder("qwen3", True)
    saved = ranks(1, save_and_continue, folder, ONE, str(tmp_path))[0]
    loaded = ranks(1, load_under_layers_with_extra_state, folder, ONE, str(tmp_path))[0]
    assert loaded[0] == saved[0]
    assert not differing(loaded[1], saved[1])


def load_into_another_model(rank: int, folder: str, checkpoints: str):
    from megatron_g2rl.policy.checkpoint.checkpoints import CheckpointError, latest

    try:
        load_policy(make_policy(folder, {}), latest(Path(checkpoints)))
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("family, tied, named", [("llama", True, "qk_norm"), ("qwen3", False, "tied")])
def test_a_checkpoint_of_another_model_is_refused(family, tied, named, ranks, model_folder, tmp_path):
    ranks(1, save_often, model_folder("qwen3", True), str(tmp_path))
    message = ranks(1, load_into_another_model, model_folder(family, tied), str(tmp_path))[0]
    assert "another model" in message and named in message and "run.name" in message


def save_often(rank: int, folder: str, checkpoints: str):
    policy = make_policy(folder, {})
    for step in range(1, 5):
        save_policy(policy, Path(checkpoints), step, {"step": step}, keep=2)


def test_only_the_last_checkpoints_are_kept(ranks, model_folder, tmp_path):
    ranks(1, save_often, model_folder("qwen3", True), str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def save_with_a_best_one(rank: int, folder: str, checkpoints: str):
    policy = make_policy(folder, {})
    saves = open_checkpoints(policy, Path(checkpoints), keep=1, asynchronous=False)
    for step in range(1, 6):
        saves.save(step, {"step": step}, protect={2})


def test_the_best_checkpoint_is_kept_too_and_is_a_valid_model_folder(ranks, model_folder, tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    ranks(1, save_with_a_best_one, model_folder("qwen3", True), str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000005"]
    assert AutoConfig.from_pretrained(tmp_path / "step_00000002").model_type == "qwen3"
    assert AutoTokenizer.from_pretrained(tmp_path / "step_00000002").decode([5]) == "w5"


class Copies(TorchDispatchMode):
    """Bytes that were copied."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("copy_", "_to_copy", "clone"):
            self.bytes += args[0].nbytes
        return function(*args, **(kwargs or {}))


def swap_and_update(rank: int, folder: str, layout: dict):
    policy = make_policy(folder, layout, keep_reference=True)
    batch = sequences(policy.architecture.vocab_size)
    before = torch.cat(policy.score(batch, features=False).logprobs)
    train(policy, 2)
    weights = export(policy)
    entering, leaving = Copies(), Copies()
    swap = policy.reference_weights()
    with entering:
        swap.__enter__()
    reference = torch.cat(policy.score(batch, features=False).logprobs)
    with leaving:
        swap.__exit__(None, None, None)
    assert entering.bytes == sum(p.nbytes for p in policy._parameters()) and leaving.bytes == 0
    after = torch.cat(policy.score(batch, features=False).logprobs)
    same = all(torch.equal(tensor, weights[name]) for name, tensor in export(policy).items())
    return before, reference, after, same


@pytest.mark.parametrize("layout", [dict(), dict(overlap_communication=True)], ids=["plain", "overlap"])
def test_reference_weights_are_the_initial_ones_and_leave_the_trained_weights_unchanged(layout, ranks, model_folder):
    before, reference, after, same = ranks(2, swap_and_update, model_folder("qwen3", False), layout)[0]
    assert torch.equal(before, reference) and same
    assert not torch.allclose(before, after, atol=1e-3)


def lonely_update(rank: int, folder: str, layout: dict):
    """One response, so that one of two data-parallel ranks has only an empty micro-batch."""
    policy = make_policy(folder, layout)
    result, metrics, _ = policy.update(sequences(policy.architecture.vocab_size)[:1], weighted_loss)
    return result.applied, result.gradient_norm, metrics["loss"]


@pytest.mark.parametrize("layout", [dict(), dict(pipeline_parallel=2)], ids=["dp2", "pp2"])
def test_an_update_may_have_fewer_responses_than_ranks(layout, ranks, model_folder):
    folder = model_folder("qwen3", True)
    applied, norm, loss = ranks(2, lonely_update, folder, layout)[0]
    _, expected_norm, expected_loss = ranks(1, lonely_update, folder, {})[0]
    assert applied and (norm, loss) == (pytest.approx(expected_norm, rel=2e-5), pytest.approx(expected_loss, rel=2e-5))


def poison(rank: int, folder: str):
    """An update with a non-finite loss leaves the weights unchanged, and the next update succeeds."""
    policy = make_policy(folder, {})
    weights = export(policy)
    batch = sequences(policy.architecture.vocab_size)

    def infinite(logprobs, entropy, packed):
        return logprobs.sum() * float("inf"), {}

    bad, *_ = policy.update(batch, infinite)
    unchanged = all(torch.equal(tensor, weights[name]) for name, tensor in export(policy).items())
    good, *_ = policy.update(batch, weighted_loss)
    return bad.applied, unchanged, good.applied


def test_a_non_finite_update_is_skipped_and_changes_nothing(ranks, model_folder):
    assert ranks(2, poison, model_folder("qwen3", False)) == [(False, True, True)] * 2


def load_and_export(rank: int, folder: str, layout: dict, checkpoints: str):
    from megatron_g2rl.policy.checkpoint.checkpoints import latest

    policy = make_policy(folder, layout)
    load_policy(policy, latest(Path(checkpoints)))
    own = torch.cat([p.detach().flatten() for chunk in policy.chunks for p in chunk.parameters()])
    shards = [t.detach().flatten() for o in policy.optimizer.megatron.chained_optimizers for t in o.optimizer.state]
    return own, torch.cat(shards), export(policy)


@pytest.mark.parametrize("layout", [DP2, REPLICATED], ids=["distributed", "replicated"])
def test_a_bf16_run_resumed_in_fp32_has_its_master_weights_on_every_rank(layout, ranks, model_folder, tmp_path):
    folder = model_folder("qwen3", True)
    ranks(2, save_and_continue, folder, BF16, str(tmp_path))
    (first, shards, exported), (second, other_shards, _) = ranks(2, load_and_export, folder, layout, str(tmp_path))
    assert torch.equal(first, second)
    assert not torch.equal(first, first.bfloat16().float())
    if layout is DP2:
        # Together the master weights of the two ranks are all weights, in the order of Megatron's buffer.
        assert torch.equal(torch.cat([shards, other_shards]).sort().values, first.sort().values)
    assert all(tensor.dtype == torch.float32 for tensor in exported.values())
