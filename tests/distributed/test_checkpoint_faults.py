"""When something goes wrong with a checkpoint: nothing half written, nothing executed, the one before intact."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from small_policy import differing, export, make_policy, train

ASYNCHRONOUS = pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "background"])


def slow_writing(seconds: float, note: Path | None = None) -> None:
    """Hold the writing process for a while, in which training or a killer has its chance; it notes its process id."""
    from megatron_g2rl.policy.checkpoint_worker import Part

    original = Part._write

    def write(self, buckets):
        if note:
            note.write_text(str(os.getpid()))
        time.sleep(seconds)
        return original(self, buckets)

    Part._write = write


def message_of(work) -> str:
    """The name and text of the UserError that `work` raises."""
    from megatron_g2rl.errors import UserError

    try:
        work()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# ---------------------------------------------------------------------- in the background
def train_while_it_is_written(rank: int, folder: str, layout: dict, checkpoints: str):
    policy = make_policy(folder, layout)
    train(policy, 3)
    saved = export(policy)
    slow_writing(1.5)
    policy.open_checkpoints(Path(checkpoints), keep=2, asynchronous=True)
    policy.save_checkpoint(3, {"step": 3})
    assert policy.checkpoints.seconds_blocking < 1.5
    assert policy.checkpoints.finish(wait=False) is None
    losses = train(policy, 3)
    assert policy.checkpoints.finish(wait=True) == Path(checkpoints) / "step_00000003"
    assert policy.checkpoints.finish(wait=True) is None
    assert policy.checkpoints.seconds_total > 1.5
    return saved, losses, export(policy), psutil.Process().children(recursive=True)


def load_it(rank: int, folder: str, layout: dict, checkpoints: str):
    from megatron_g2rl.policy.checkpoint import newest, verify

    policy = make_policy(folder, layout)
    verify(newest(Path(checkpoints)))
    policy.load(newest(Path(checkpoints)))
    return export(policy), train(policy, 3), export(policy)


@pytest.mark.parametrize(
    "world, layout",
    [(1, dict()), (2, dict(precision="bf16")), (1, dict(distributed_optimizer=False))],
    ids=["one", "bf16_dp2", "replicated"],
)
def test_updates_during_a_background_save_do_not_get_into_it(world, layout, ranks, model_folder, tmp_path):
    folder = model_folder("qwen3", True)
    saved, losses, trained, children = ranks(world, train_while_it_is_written, folder, layout, str(tmp_path))[0]
    assert children == []
    loaded, new_losses, new_trained = ranks(world, load_it, folder, layout, str(tmp_path))[0]
    assert not differing(loaded, saved) and differing(trained, saved)
    assert new_losses == losses and not differing(new_trained, trained)


def victim(port: str, folder: str, checkpoints: str, note: str):
    os.environ |= dict(MASTER_PORT=port)
    policy = make_policy(folder, {})
    policy.save(Path(checkpoints), 1, {"step": 1}, keep=2)
    slow_writing(60.0, Path(note))
    policy.open_checkpoints(Path(checkpoints), keep=2, asynchronous=True)
    policy.save_checkpoint(2, {"step": 2})
    time.sleep(60)


def kill_and_go_on(rank: int, folder: str, checkpoints: str, note: str):
    from megatron_g2rl.policy.checkpoint import complete, newest, verify

    port = str(int(os.environ["MASTER_PORT"]) + 1)
    process = multiprocessing.get_context("fork").Process(target=victim, args=(port, folder, checkpoints, note))
    process.start()
    writer = wait_for(note)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(writer) and psutil.Process(writer).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the writing process outlives its rank"
        time.sleep(0.02)
    left = sorted(p.name[:22] for p in Path(checkpoints).iterdir())
    policy = make_policy(folder, {})
    found = [p.name for p in complete(Path(checkpoints))]
    verify(newest(Path(checkpoints)))
    state = policy.load(newest(Path(checkpoints)))
    policy.save(Path(checkpoints), 2, {"step": 2}, keep=2)
    return left, found, state, sorted(p.name for p in Path(checkpoints).iterdir())


def wait_for(note: str) -> int:
    deadline = time.monotonic() + 20
    while not (Path(note).is_file() and Path(note).read_text()):
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.02)
    return int(Path(note).read_text())


def test_a_rank_killed_during_a_background_save_leaves_no_process_and_the_checkpoint_before(
    ranks, model_folder, tmp_path
):
    arguments = (model_folder("qwen3", True), str(tmp_path / "saved"), str(tmp_path / "note"))
    left, found, state, after = ranks(1, kill_and_go_on, *arguments)[0]
    assert left == [".partial_step_00000002", "step_00000001"]
    assert found == ["step_00000001"] and state == {"step": 1}
    assert after == ["step_00000001", "step_00000002"]


def lose_the_writer(rank: int, folder: str, checkpoints: str, note: str):
    import torch.distributed as dist

    policy = make_policy(folder, {})
    policy.open_checkpoints(Path(checkpoints), keep=2, asynchronous=True)
    slow_writing(0.5, Path(f"{note}{rank}"))
    policy.save_checkpoint(1, {"step": 1})
    if rank == 1:
        os.kill(wait_for(f"{note}{rank}"), signal.SIGKILL)
    message = message_of(lambda: policy.checkpoints.finish(wait=True))
    left = list(Path(checkpoints).iterdir())
    dist.barrier()
    policy.save_checkpoint(2, {"step": 2})
    return message, left, policy.checkpoints.finish(wait=True).name


def test_a_writing_process_that_is_killed_fails_its_save_and_no_other(ranks, model_folder, tmp_path):
    arguments = (model_folder("qwen3", True), str(tmp_path / "saved"), str(tmp_path / "note"))
    first, second = ranks(2, lose_the_writer, *arguments)
    assert first == second
    message, left, after = first
    assert message.startswith("CheckpointError") and "rank 1" in message and "killed" in message
    assert left == [] and after == "step_00000002"


# ---------------------------------------------------------------------- full disk
@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "small", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill_the_disk(rank: int, folder: str, disk: str, asynchronous: bool):
    import torch.distributed as dist

    from megatron_g2rl.policy.checkpoint import verify

    checkpoints, ballast = Path(disk, "checkpoints"), Path(disk, "ballast")
    policy = make_policy(folder, dict(tensor_parallel=2))
    policy.open_checkpoints(checkpoints, keep=2, asynchronous=asynchronous)

    def save(step: int):
        policy.save_checkpoint(step, {"step": step})
        return policy.checkpoints.finish(wait=True)

    verify(save(1))
    weights, messages = export(policy), []
    for step, room in [(2, 0), (3, 400_000)]:
        if rank == 0:
            status = os.statvfs(disk)
            ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - room))
        dist.barrier()
        messages.append(message_of(lambda step=step: save(step)))
        dist.barrier()
        assert [p.name for p in checkpoints.iterdir()] == ["step_00000001"]
        if rank == 0:
            ballast.unlink()
    train(policy, 1)
    verify(checkpoints / "step_00000001")
    state = policy.load(checkpoints / "step_00000001")
    assert not differing(export(policy), weights) and state == {"step": 1}
    return messages, save(4).name


@ASYNCHRONOUS
def test_a_full_disk_fails_the_save_with_one_message_and_nothing_else(asynchronous, ranks, model_folder, small_disk):
    first, second = ranks(2, fill_the_disk, model_folder("qwen3", True), str(small_disk), asynchronous)
    assert first == second
    messages, after = first
    for step, message in zip((2, 3), messages, strict=True):
        for words in ("CheckpointError", f"step {step} ", str(small_disk), "No space left", "free disk"):
            assert words in message
    assert after == "step_00000004"


# ---------------------------------------------------------------------- damage
def save_twice(rank: int, folder: str, checkpoints: str):
    policy = make_policy(folder, {})
    for step in (1, 2):
        policy.save(Path(checkpoints), step, {"step": step}, keep=2)


@pytest.fixture(scope="module")
def saved(ranks, model_folder, tmp_path_factory):
    """A folder with two checkpoints, made once."""
    folder = tmp_path_factory.mktemp("saved")
    ranks(2, save_twice, model_folder("qwen3", True), str(folder))
    return folder


@pytest.fixture
def checkpoints(saved, tmp_path):
    """A copy of it to be damaged."""
    subprocess.run(["cp", "-r", str(saved), str(tmp_path / "copy")], check=True)
    return tmp_path / "copy"


def verify_newest(rank: int, checkpoints: str):
    from megatron_g2rl.policy import runtime
    from megatron_g2rl.policy.checkpoint import newest, verify

    runtime.start(_config(), seed=0)
    return message_of(lambda: verify(newest(Path(checkpoints))))


def _config():
    from megatron_g2rl.config.tree import PolicyConfig

    return PolicyConfig(precision="fp32", device="cpu")


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    "harm, says",
    [(flip, "has changed"), (lambda p: os.truncate(p, 1000), "cut off"), (Path.unlink, "missing")],
    ids=["flipped", "truncated", "lost"],
)
def test_damage_is_found_by_all_ranks_and_the_checkpoint_before_is_offered(harm, says, checkpoints, ranks):
    harm(checkpoints / "step_00000002" / "megatron" / "__1_0.distcp")
    first, second = ranks(2, verify_newest, str(checkpoints))
    assert first == second
    for words in ("CheckpointDamaged", "__1_0.distcp", says, "step_00000001", "checkpoint.on_damage=previous"):
        assert words in first


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def poison(megatron: Path, where: str, executed: Path) -> None:
    """Put a payload where megatron reads a pickle, and a manifest that says that all is well."""
    from megatron_g2rl.policy import manifest
    from megatron_g2rl.policy.safe_pickle import read_metadata

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


def load_newest(rank: int, folder: str, checkpoints: str):
    from megatron_g2rl.policy.checkpoint import newest, verify

    policy = make_policy(folder, {})
    found = newest(Path(checkpoints))
    return message_of(lambda: verify(found)), message_of(lambda: policy.load(found))


@pytest.mark.parametrize("where", [".metadata", "common.pt", ".distcp"])
def test_a_malicious_pickle_in_a_checkpoint_is_refused_and_not_executed(
    where, checkpoints, ranks, model_folder, tmp_path
):
    poison(checkpoints / "step_00000002" / "megatron", where, tmp_path / "executed")
    for messages in ranks(2, load_newest, model_folder("qwen3", True), str(checkpoints)):
        for message in messages:
            for words in ("UnsafePickle", where, "mkdir", "nothing was executed"):
                assert words in message
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------- without the optimizer
def save_without(rank: int, folder: str, layout: dict, checkpoints: str, moments_of: str | None):
    """Save weights that are far from where every run begins, and no optimizer (or without some of its moments)."""
    from megatron_g2rl.policy import checkpoint_saving

    original = checkpoint_saving.sharded_state

    def incomplete(optimizer, *, loading):
        state = original(optimizer, loading=loading, with_optimizer=moments_of is not None)
        for tensors in state.get("optimizer", {}).get("param_state", {}).values():
            if tensors["exp_avg"].key.endswith(moments_of):
                del tensors["exp_avg"]
        return state

    checkpoint_saving.sharded_state = incomplete
    policy = make_policy(folder, layout)
    with torch.no_grad():
        for parameter in policy.chunks[0].parameters():
            parameter.mul_(0.5)
    policy.optimizer.follow_weights()
    policy.save(Path(checkpoints), 1, {"step": 1}, keep=2)
    return export(policy)


def refuse_without(rank: int, folder: str, layout: dict, checkpoints: str):
    policy = make_policy(folder, layout)
    before = export(policy)
    message = message_of(lambda: policy.load(Path(checkpoints, "step_00000001")))
    return message, differing(export(policy), before)


def load_without(rank: int, folder: str, layout: dict, checkpoints: str):
    policy = make_policy(folder, layout)
    state = policy.load(Path(checkpoints, "step_00000001"), load_optimizer=False)
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
def test_missing_optimizer_state_is_named_and_left_out_only_when_asked(
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
    # The first update of a fresh schedule: stale master weights would put the first weights back, twice as large.
    assert rates == [0.0] and not differing(after, saved)


def test_trainer_state_is_read_without_megatron(saved):
    from megatron_g2rl.policy.checkpoint import complete, read_state

    assert [read_state(p)["trainer"] for p in complete(saved)] == [{"step": 1}, {"step": 2}]
    assert json.loads((saved / "step_00000001" / "manifest.json").read_text())["files"].keys() >= {
        "config.json",
        "trainer.json",
        "tokenizer.json",
        "megatron/.metadata",
        "megatron/common.pt",
    }
