"""Checkpoints in Megatron's own format, as earlier versions of this package saved them, and ours read by Megatron."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_models import write_random_model
from small_policy import differing, export, load_policy, make_policy, message_of, save_policy, train

SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def megatron_state(policy, *, loading: bool) -> dict:
    """Megatron's own complete sharded state, which earlier versions saved."""
    from megatron_g2rl.policy.model import unwrap

    state = {"model": unwrap(policy.chunks[0]).sharded_state_dict(metadata=SHARDING)}
    state["optimizer"] = policy.optimizer.megatron.sharded_state_dict(
        state["model"], is_loading=loading, metadata=SHARDING
    )
    return state


def save_as_earlier_versions(rank: int, folder: str, layout: dict, checkpoints: str, updates: int):
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megatron_g2rl.policy.checkpoint import manifest

    policy = make_policy(folder, layout)
    train(policy, updates)
    save_policy(policy, Path(checkpoints), 1, {"step": 1}, keep=1)
    checkpoint = Path(checkpoints, "step_00000001")
    state = megatron_state(policy, loading=False) | {"schedule": policy.optimizer.schedule.state_dict()}
    if rank == 0:
        for file in (checkpoint / "megatron").iterdir():
            file.unlink()
    dist.barrier()
    dist_checkpointing.save(state, str(checkpoint / "megatron"))
    if rank == 0:
        store_common_as_file(checkpoint / "megatron")
        manifest.write(checkpoint)
    dist.barrier()
    return export(policy), train(policy, 2), export(policy)


def store_common_as_file(folder: Path) -> None:
    """megatron-core 0.19 stores in an object what 0.16, which those versions used, stores in common.pt."""
    from megatron.core import dist_checkpointing

    if not (folder / "common.pt").exists():
        torch.save(dist_checkpointing.load_common_state_dict(str(folder)), folder / "common.pt")


def load(rank: int, folder: str, layout: dict, checkpoints: str):
    policy = make_policy(folder, layout)
    message = message_of(lambda: load_policy(policy, Path(checkpoints, "step_00000001")))
    return message, export(policy), train(policy, 2), export(policy)


def load_weights(rank: int, folder: str, layout: dict, checkpoints: str):
    policy = make_policy(folder, layout)
    load_policy(policy, Path(checkpoints, "step_00000001"), load_optimizer=False)
    return export(policy)


ODD = dict(intermediate_size=101, num_hidden_layers=2, tie_word_embeddings=True)


@pytest.mark.parametrize(
    "world, layout",
    [(1, {}), (2, dict(precision="bf16")), (2, dict(precision="bf16", distributed_optimizer=False))],
    ids=["one", "bf16_dp2", "bf16_replicated"],
)
def test_a_correct_checkpoint_of_an_earlier_version_resumes(world, layout, ranks, tmp_path):
    folder = write_random_model(tmp_path / "model", **ODD)
    _, numbers, trained = ranks(world, save_as_earlier_versions, folder, layout, str(tmp_path / "saved"), 3)[0]
    message, _, again, loaded = ranks(world, load, folder, layout, str(tmp_path / "saved"))[0]
    assert (message, again) == ("no error", numbers)
    assert not differing(loaded, trained)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_shifted_checkpoint_of_an_earlier_version_is_refused_with_a_remedy(precision, ranks, tmp_path):
    folder, layout = write_random_model(tmp_path / "model", **ODD), dict(pipeline_parallel=2, precision=precision)
    weights, _, _ = ranks(2, save_as_earlier_versions, folder, layout, str(tmp_path / "saved"), 3)[0]
    for message, *_ in ranks(2, load, folder, layout, str(tmp_path / "saved")):
        for words in ("CheckpointError", "earlier version", "step_00000001", "checkpoint.load_optimizer=false"):
            assert words in message
    for loaded in ranks(2, load_weights, folder, layout, str(tmp_path / "saved")):
        assert not differing(loaded, weights)


def read_ours_with_megatron(rank: int, folder: str, layout: dict, checkpoints: str):
    from megatron.core import dist_checkpointing

    policy = make_policy(folder, layout)
    train(policy, 2)
    save_policy(policy, Path(checkpoints), 2, {}, keep=1)
    expected = megatron_state(policy, loading=False)
    loaded = dist_checkpointing.load(
        megatron_state(policy, loading=True), str(Path(checkpoints, "step_00000002/megatron"))
    )
    pairs = [
        (loaded["model"][key], entry.data) for key, entry in expected["model"].items() if torch.is_tensor(entry.data)
    ]
    for number, states in expected["optimizer"]["param_state"].items():
        pairs += [(loaded["optimizer"]["param_state"][number][name], states[name].data) for name in states]
    return [bool(torch.equal(one, other.detach())) for one, other in pairs]


def test_megatron_itself_reads_our_weights_master_weights_and_moments(ranks, tmp_path):
    """One bucket without padding: the case in which Megatron's own gather is correct."""
    folder = write_random_model(tmp_path / "model")
    for same in ranks(2, read_ours_with_megatron, folder, {}, str(tmp_path / "saved")):
        assert len(same) > 60 and all(same)


def corrupt(rank: int, folder: str, checkpoints: str):
    """A checkpoint whose moments were swapped between two layers after its digests were computed."""
    from megatron_g2rl.policy.checkpoint import save as checkpoint_saving

    original = checkpoint_saving.saved_state

    def exchanged(optimizer):
        state = original(optimizer)
        moments = [b for b in state.blocks if b.piece.key.endswith("exp_avg.decoder.layers.mlp.linear_fc2.weight")]
        values = [block.tensor.clone() for block in moments]
        for block, value in zip(moments, reversed(values), strict=True):
            block.tensor.copy_(value)
        return state

    checkpoint_saving.saved_state = exchanged
    policy = make_policy(folder, {})
    train(policy, 2)
    save_policy(policy, Path(checkpoints), 1, {}, keep=1)


def test_state_that_differs_from_what_was_saved_stops_the_run_before_training(ranks, tmp_path):
    folder = write_random_model(tmp_path / "model")
    ranks(1, corrupt, folder, str(tmp_path / "saved"))
    message = ranks(1, load, folder, {}, str(tmp_path / "saved"))[0][0]
    for words in ("CheckpointError", "digests", "exp_avg.decoder.layers.mlp.linear_fc2.weight[0]", "load_optimizer"):
        assert words in message
