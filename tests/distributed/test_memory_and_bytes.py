"""Bytes that checkpoints, resuming and offloading between updates need, counted with real ranks over gloo."""

from __future__ import annotations

import pytest
import torch
from small_policy import export, load_policy, make_policy, save_policy, train
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class NewMemory(TorchDispatchMode):
    """Peak number of bytes of the storages allocated inside the context."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {StorageWeakRef(x.untyped_storage()) for x in _tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for x in _tensors(result):
            reference = StorageWeakRef(x.untyped_storage())
            if reference not in before:
                self.storages[reference] = x.untyped_storage().nbytes()
        self.storages = {storage: size for storage, size in self.storages.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.storages.values()))
        return result


def _tensors(values) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]


def save_and_count(rank: int, folder: str, layout: dict) -> tuple[int, int]:
    """(bytes allocated to collect the state of a checkpoint, bytes of this rank's optimizer state)."""
    from megatron_g2rl.policy.checkpoint.optimizer_state import state_shards
    from megatron_g2rl.policy.checkpoint.state import saved_state

    policy = make_policy(folder, layout)
    train(policy, 1)
    with NewMemory() as memory:
        saved_state(policy.optimizer)
    held = sum(tensor.nbytes for shard in state_shards(policy.optimizer) for tensor in shard.tensors.values())
    return memory.peak, held


@pytest.mark.parametrize(
    "layout", [dict(), dict(distributed_optimizer=False), dict(precision="bf16")], ids=["sharded", "replicated", "bf16"]
)
def test_a_checkpoint_needs_no_second_copy_of_the_optimizer_state(layout, ranks, model_folder):
    """Megatron's gather allocates 12 bytes per parameter of all ranks on the device, three times that on the host."""
    for peak, held in ranks(2, save_and_count, model_folder("qwen3", False), layout):
        assert peak < 0.1 * held


def save(rank: int, folder: str, layout: dict, checkpoints: str) -> None:
    from pathlib import Path

    policy = make_policy(folder, layout)
    train(policy, 2)
    save_policy(policy, Path(checkpoints), 2, {"step": 2}, keep=1)


def load_and_count(rank: int, folder: str, layout: dict, checkpoints: str) -> tuple[int, int, int]:
    """(bytes read, of the weights, of the optimizer's state)."""
    from pathlib import Path

    from megatron_g2rl.policy.hf.megatron_folder import MegatronTensors

    policy = make_policy(folder, layout)
    read, read_rows = [], MegatronTensors.read_rows

    def counted(self, piece, first, last):
        rows = read_rows(self, piece, first, last)
        read.append(rows.nbytes)
        return rows

    MegatronTensors.read_rows = counted
    load_policy(policy, Path(checkpoints) / "step_00000002")
    weights = sum(p.nbytes for p in policy._parameters())
    numbers = sum(p.numel() for p in policy._parameters())
    return sum(read), weights, 12 * numbers


@pytest.mark.parametrize("optimizer", [True, False], ids=["sharded", "replicated"])
@pytest.mark.parametrize("world", [2, 4])
def test_data_parallel_ranks_together_read_a_checkpoint_once(world, optimizer, ranks, model_folder, tmp_path):
    folder, layout = model_folder("qwen3", False), dict(precision="bf16", distributed_optimizer=optimizer)
    ranks(world, save, folder, layout, str(tmp_path))
    counted = ranks(world, load_and_count, folder, layout, str(tmp_path))
    _, weights, state = counted[0]
    total = sum(read for read, _, _ in counted)
    # Rows that straddle two ranks are read by both.
    assert weights + state <= total < 1.05 * (weights + state)
    assert max(read for read, _, _ in counted) < 1.3 * total / world


OFFLOADED = ("bf16", "fp32", "replicated", "experts")


def train_with_rests(rank: int, folder: str, layout: dict, rests: bool):
    policy = make_policy(folder, layout)
    losses = []
    for _ in range(3):
        losses += train(policy, 1)[0]
        if rests:
            policy.rest()
            held = sum(buffer.untyped_storage().nbytes() for buffer in policy.optimizer._gradient_buffers())
            assert held == 0
            if layout.get("offload_optimizer"):
                assert policy.optimizer._state_storages() == [] and policy.optimizer._resting
    return losses, export(policy)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen3", dict()),
        ("qwen3", dict(overlap_communication=True)),
        ("qwen3", dict(distributed_optimizer=False, precision="bf16")),
        ("qwen3_moe", dict(expert_parallel=2)),
        ("qwen3", dict(precision="bf16", offload_optimizer=True)),
        ("qwen3", dict(offload_optimizer=True)),
        ("qwen3", dict(precision="bf16", distributed_optimizer=False, offload_optimizer=True)),
        ("qwen3_moe", dict(expert_parallel=2, precision="bf16", offload_optimizer=True)),
    ],
    ids=["sharded", "overlap", "replicated bf16", "experts", *(f"offload {kind}" for kind in OFFLOADED)],
)
def test_gradient_buffers_are_freed_between_updates_without_effect_on_training(family, layout, ranks, model_folder):
    folder = model_folder(family, False)
    losses, weights = ranks(2, train_with_rests, folder, layout, True)[0]
    expected_losses, expected = ranks(2, train_with_rests, folder, layout, False)[0]
    assert losses == expected_losses
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def save_at_rest(rank: int, folder: str, checkpoints: str):
    from pathlib import Path

    policy = make_policy(folder, dict(precision="bf16", offload_optimizer=True))
    train(policy, 2)
    policy.rest()
    path = save_policy(policy, Path(checkpoints), 2, {"step": 2}, keep=1)
    losses = train(policy, 2)[0]
    policy.rest()
    load_policy(policy, path)
    return losses, train(policy, 2)[0]


def test_a_checkpoint_is_saved_and_loaded_while_the_optimizer_is_offloaded(ranks, model_folder, tmp_path):
    for losses, again in ranks(2, save_at_rest, model_folder("qwen3", False), str(tmp_path)):
        assert losses == again


def stream_experts(rank: int, folder: str, layout: dict, size: int):
    """(calls that gather experts, all tensors of the stream), with bundles of `size` bytes."""
    import torch.distributed as dist

    from megatron_g2rl.policy.hf import weights

    policy = make_policy(folder, layout)
    weights.EXPERT_BYTES, gather, calls = size, weights._all_gather, 0

    def counted(tensor, group):
        nonlocal calls
        calls += group is not None and dist.get_world_size(group) > 1
        return gather(tensor, group)

    weights._all_gather = counted
    tensors = export(policy)
    return calls, tensors


def test_the_experts_of_a_layer_are_gathered_in_one_call(ranks, model_folder):
    """A 235B model has tens of thousands: one by one, each would be a collective."""
    folder, layout = model_folder("qwen3_moe", False), dict(expert_parallel=2)
    (one_by_one, expected), _ = ranks(2, stream_experts, folder, layout, 1)
    for size, most in ((1 << 30, 4), (200_000, one_by_one)):
        for calls, tensors in ranks(2, stream_experts, folder, layout, size):
            assert 4 <= calls <= most < 2 * one_by_one
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert one_by_one >= 4 * 4, "four layers, of two experts or more with two parameters a rank"
