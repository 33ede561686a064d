"""A corrupt, malicious or incomplete checkpoint is reported by name; nothing of it is executed or partly loaded."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch
from small_policy import differing, export, load_policy, make_policy, message_of, save_policy, train


def save_twice(rank: int, folder: str, checkpoints: str, layout: dict | None = None):
    policy = make_policy(folder, layout or {})
    for step in (1, 2):
        save_policy(policy, Path(checkpoints), step, {"step": step}, keep=2)


@pytest.fixture(scope="module")
def saved(ranks, model_folder, tmp_path_factory):
    """A folder with two checkpoints, created once."""
    folder = tmp_path_factory.mktemp("saved")
    ranks(2, save_twice, model_folder("qwen3", True), str(folder))
    return folder


@pytest.fixture
def checkpoints(saved, tmp_path):
    """A copy of it for a test to corrupt."""
    subprocess.run(["cp", "-r", str(saved), str(tmp_path / "copy")], check=True)
    return tmp_path / "copy"


def verify_latest(rank: int, checkpoints: str):
    from megatron_g2rl.policy import runtime
    from megatron_g2rl.policy.checkpoint.checkpoints import latest, verify

    runtime.start(_config(), seed=0)
    return message_of(lambda: verify(latest(Path(checkpoints))))


def _config():
    from megatron_g2rl.config.sections.model import PolicyConfig

    return PolicyConfig(precision="fp32", device="cpu")


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    "harm, reason",
    [(flip, "has changed"), (lambda p: os.truncate(p, 1000), "truncated"), (Path.unlink, "missing")],
    ids=["flipped", "truncated", "lost"],
)
def test_corruption_is_detected_by_all_ranks_and_the_previous_checkpoint_is_suggested(harm, reason, checkpoints, ranks):
    harm(checkpoints / "step_00000002" / "megatron" / "__1_0.distcp")
    first, second = ranks(2, verify_latest, str(checkpoints))
    assert first == second
    for words in ("CorruptCheckpoint", "__1_0.distcp", reason, "step_00000001", "checkpoint.on_corruption=previous"):
        assert words in first


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def poison(megatron: Path, where: str, executed: Path) -> None:
    """Put a payload where Megatron reads a pickle, and write a manifest that matches it."""
    from megatron_g2rl.policy.checkpoint import manifest
    from megatron_g2rl.policy.checkpoint.safe_pickle import read_metadata

    if where == ".metadata":
        (megatron / ".metadata").write_bytes(pickle.dumps(Payload(executed)))
    elif where == "common.pt":
        torch.save({"optimizer": Payload(executed)}, megatron / "common.pt")
    else:
        metadata = read_metadata(megatron)
        index = next(i for i in metadata.storage_data if i.fqn.endswith("_extra_state/shard_0_4"))
        entry = metadata.storage_data[index]
        shard = megatron / entry.relative_path
        metadata.storage_data[index] = type(entry)(entry.relative_path, shard.stat().st_size, 0)
        with shard.open("ab") as file:
            torch.save(Payload(executed), file)
            metadata.storage_data[index].length = file.tell() - metadata.storage_data[index].offset
        (megatron / ".metadata").write_bytes(pickle.dumps(metadata))
    manifest.write(megatron.parent)


def load_latest(rank: int, folder: str, checkpoints: str):
    from megatron_g2rl.policy.checkpoint.checkpoints import latest, verify

    policy = make_policy(folder, {})
    found = latest(Path(checkpoints))
    return message_of(lambda: verify(found)), message_of(lambda: load_policy(policy, found))


@pytest.mark.parametrize("where", [".metadata", "common.pt", ".distcp"])
def test_a_malicious_pickle_in_a_checkpoint_is_refused_and_not_executed(
    where, checkpoints, ranks, model_folder, tmp_path
):
    poison(checkpoints / "step_00000002" / "megatron", where, tmp_path / "executed")
    for messages in ranks(2, load_latest, model_folder("qwen3", True), str(checkpoints)):
        for message in messages:
            for words in ("UnsafePickle", where, "mkdir", "nothing was executed"):
                assert words in message
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------- without the optimizer
def save_without(rank: int, folder: str, layout: dict, checkpoints: str, moments_of: str | None):
    """Save weights far from the initial ones, without an optimizer (or without some of its moments)."""
    from dataclasses import replace

    from megatron_g2rl.policy.checkpoint import save as checkpoint_saving

    original = checkpoint_saving.saved_state

    def incomplete(optimizer):
        state = original(optimizer)
        keys = [block.piece.key for block in state.blocks]
        lost = {key for key in keys if key.startswith("optimizer.")}
        if moments_of:
            lost = {key for key in keys if key.startswith("optimizer.state.exp_avg.") and key.endswith(moments_of)}
        blocks = [block for block in state.blocks if block.piece.key not in lost]
        return replace(state, blocks=blocks, common=state.common if moments_of else {})

    checkpoint_saving.saved_state = incomplete
    policy = make_policy(folder, layout)
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.mul_(0.5)
    policy.optimizer.follow_weights()
    save_policy(policy, Path(checkpoints), 1, {"step": 1}, keep=2)
    return export(policy)


def refuse_without(rank: int, folder: str, layout: dict, checkpoints: str):
    policy = make_policy(folder, layout)
    before = export(policy)
    message = message_of(lambda: load_policy(policy, Path(checkpoints, "step_00000001")))
    return message, differing(export(policy), before)


def load_without(rank: int, folder: str, layout: dict, checkpoints: str):
    policy = make_policy(folder, layout)
    state = load_policy(policy, Path(checkpoints, "step_00000001"), load_optimizer=False)
    loaded = export(policy)
    _, rates = train(policy, 1)
    return state, loaded, rates, export(policy)


@pytest.mark.parametrize(
    "layout, moments_of, named",
    [
        (dict(precision="bf16"), None, ("optimizer", "schedule")),
        (dict(precision="bf16", distributed_optimizer=False), None, ("optimizer", "schedule")),
        (dict(), "linear_fc2.weight", ("optimizer.state.exp_avg.", "linear_fc2.weight")),
    ],
    ids=["none", "none_replicated", "some_moments"],
)
def test_missing_optimizer_state_is_reported_and_skipped_only_on_request(
    layout, moments_of, named, ranks, model_folder, tmp_path
):
    folder = model_folder("qwen3", True)
    saved = ranks(1, save_without, folder, layout, str(tmp_path), moments_of)[0]
    message, changed = ranks(1, refuse_without, folder, layout, str(tmp_path))[0]
    state, loaded, rates, after = ranks(1, load_without, folder, layout, str(tmp_path))[0]
    for words in ("CheckpointError", "checkpoint.load_optimizer=false", *named):
        assert words in message
    assert not changed
    assert state == {"step": 1} and not differing(loaded, saved)
    # The first update of a fresh schedule: stale master weights would restore the initial weights, twice as large.
    assert rates == [0.0] and not differing(after, saved)


def test_trainer_state_is_read_without_megatron(saved):
    from megatron_g2rl.policy.checkpoint.checkpoints import complete, read_state

    assert [read_state(p)["trainer"] for p in complete(saved)] == [{"step": 1}, {"step": 2}]
    assert json.loads((saved / "step_00000001" / "manifest.json").read_text())["files"].keys() >= {
        "config.json",
        "trainer.json",
        "tokenizer.json",
        "megatron/.metadata",
        "megatron/common.pt",
    }
