"""Checkpoints written in the background of training hold the state at the save and are complete or absent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from small_policy import differing, export, load_policy, make_policy, message_of, open_checkpoints, save_policy, train

from megatron_g2rl.distributed.ranks import reserve_port

ASYNCHRONOUS = pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "background"])


def slow_writing(seconds: float, note: Path | None = None) -> None:
    """Delay the writing process, so that training or a kill happens meanwhile; it records its process id."""
    from megatron_g2rl.policy.checkpoint.writer import ShardWriter

    original = ShardWriter._write

    def write(self):
        if note:
            note.write_text(str(os.getpid()))
        time.sleep(seconds)
        return original(self)

    ShardWriter._write = write


def hold_writing(until: Path) -> None:
    """Let the writing process wait until a file exists: a save that waits for it would never return."""
    from megatron_g2rl.policy.checkpoint.writer import ShardWriter

    original = ShardWriter._write

    def write(self):
        while not until.exists():
            time.sleep(0.02)
        return original(self)

    ShardWriter._write = write


def train_while_it_is_written(rank: int, folder: str, layout: dict, checkpoints: str):
    policy = make_policy(folder, layout)
    train(policy, 3)
    saved = export(policy)
    trained = Path(f"{checkpoints}.trained{rank}")
    hold_writing(trained)
    saves = open_checkpoints(policy, Path(checkpoints), keep=2, asynchronous=True)
    saves.save(3, {"step": 3})
    assert saves.finish(wait=False) is None
    losses = train(policy, 3)
    trained.touch()
    assert saves.finish(wait=True) == Path(checkpoints) / "step_00000003"
    assert saves.finish(wait=True) is None
    assert saves.seconds_total > saves.seconds_blocking > 0
    return saved, losses, export(policy), psutil.Process().children(recursive=True)


def save_several_times(rank: int, folder: str, checkpoints: str) -> list[int]:
    """How often the ranks have described all their tensors to each other after each save; the last one differs."""
    from megatron_g2rl.policy.checkpoint.plan import Planner

    exchange, counts, calls = Planner._exchange, [], 0

    def counted(self, *arguments):
        nonlocal calls
        calls += 1
        return exchange(self, *arguments)

    Planner._exchange = counted
    policy = make_policy(folder, {})
    saves = open_checkpoints(policy, Path(checkpoints), keep=5, asynchronous=False)
    for step in range(4):
        if step:
            train(policy, 1)
        if step == 3 and rank == 1:
            saves._planner._holdings = None
        saves.save(step, {"step": step})
        counts.append(calls)
    return counts


def test_ranks_describe_their_tensors_again_only_if_those_of_any_rank_have_changed(ranks, model_folder, tmp_path):
    counts = ranks(2, save_several_times, model_folder("qwen3", False), str(tmp_path))
    assert counts[0] == counts[1]
    assert counts[0][1] == counts[0][2] == counts[0][3] - 1


def load_it(rank: int, folder: str, layout: dict, checkpoints: str):
    from megatron_g2rl.policy.checkpoint.checkpoints import latest, verify

    policy = make_policy(folder, layout)
    verify(latest(Path(checkpoints)))
    load_policy(policy, latest(Path(checkpoints)))
    return export(policy), train(policy, 3), export(policy)


@pytest.mark.parametrize(
    "world, layout",
    [(1, dict()), (2, dict(precision="bf16")), (1, dict(distributed_optimizer=False))],
    ids=["one", "bf16_dp2", "replicated"],
)
def test_updates_during_a_background_save_are_not_part_of_it(world, layout, ranks, model_folder, tmp_path):
    folder = model_folder("qwen3", True)
    saved, losses, trained, children = ranks(world, train_while_it_is_written, folder, layout, str(tmp_path))[0]
    assert children == []
    loaded, new_losses, new_trained = ranks(world, load_it, folder, layout, str(tmp_path))[0]
    assert not differing(loaded, saved) and differing(trained, saved)
    assert new_losses == losses and not differing(new_trained, trained)


def victim(port: str, folder: str, checkpoints: str, note: str):
    os.environ |= dict(MASTER_PORT=port)
    policy = make_policy(folder, {})
    save_policy(policy, Path(checkpoints), 1, {"step": 1}, keep=2)
    slow_writing(600.0, Path(note))
    saves = open_checkpoints(policy, Path(checkpoints), keep=2, asynchronous=True)
    saves.save(2, {"step": 2})
    time.sleep(600)


def kill_and_continue(rank: int, folder: str, checkpoints: str, note: str):
    from megatron_g2rl.policy.checkpoint.checkpoints import complete, latest, verify

    with reserve_port() as reserving:
        port = str(reserving.getsockname()[1])
        process = multiprocessing.get_context("fork").Process(target=victim, args=(port, folder, checkpoints, note))
        process.start()
        writer = wait_for(note)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 120
    while not gone(writer):
        assert time.monotonic() < deadline, "the writing process outlives its rank"
        time.sleep(0.02)
    left = sorted(p.name[:22] for p in Path(checkpoints).iterdir())
    policy = make_policy(folder, {})
    found = [p.name for p in complete(Path(checkpoints))]
    verify(latest(Path(checkpoints)))
    state = load_policy(policy, latest(Path(checkpoints)))
    save_policy(policy, Path(checkpoints), 2, {"step": 2}, keep=2)
    return left, found, state, sorted(p.name for p in Path(checkpoints).iterdir())


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(note: str) -> int:
    deadline = time.monotonic() + 200
    while not (Path(note).is_file() and Path(note).read_text()):
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.02)
    return int(Path(note).read_text())


def test_a_rank_killed_during_a_background_save_leaves_no_process_and_the_previous_checkpoint(
    ranks, model_folder, tmp_path
):
    arguments = (model_folder("qwen3", True), str(tmp_path / "saved"), str(tmp_path / "note"))
    left, found, state, after = ranks(1, kill_and_continue, *arguments)[0]
    assert left == [".partial_step_00000002", "step_00000001"]
    assert found == ["step_00000001"] and state == {"step": 1}
    assert after == ["step_00000001", "step_00000002"]


def lose_the_writer(rank: int, folder: str, checkpoints: str, note: str):
    import torch.distributed as dist

    from megatron_g2rl.policy.checkpoint.writer import ShardWriter

    policy = make_policy(folder, {})
    saves = open_checkpoints(policy, Path(checkpoints), keep=2, asynchronous=True)
    original = ShardWriter._write
    if rank == 1:
        slow_writing(600.0, Path(f"{note}{rank}"))
    saves.save(1, {"step": 1})
    if rank == 1:
        os.kill(wait_for(f"{note}{rank}"), signal.SIGKILL)
        ShardWriter._write = original
    message = message_of(lambda: saves.finish(wait=True))
    left = list(Path(checkpoints).iterdir())
    dist.barrier()
    saves.save(2, {"step": 2})
    return message, left, saves.finish(wait=True).name


def test_a_killed_writing_process_fails_only_its_own_save(ranks, model_folder, tmp_path):
    arguments = (model_folder("qwen3", True), str(tmp_path / "saved"), str(tmp_path / "note"))
    first, second = ranks(2, lose_the_writer, *arguments)
    assert first == second
    message, left, after = first
    assert message.startswith("CheckpointNotWritten") and "rank 1" in message and "killed" in message
    assert left == [] and after == "step_00000002"


def close_immediately(rank: int, folder: str, checkpoints: str):
    policy = make_policy(folder, {})
    saves = open_checkpoints(policy, Path(checkpoints), keep=2, asynchronous=True)
    slow_writing(600.0)
    saves.save(1, {"step": 1})
    saves.close()
    children = psutil.Process().children(recursive=True)
    return children, saves.finish(wait=True)


def test_closing_aborts_a_save_immediately_and_leaves_no_files(ranks, model_folder, tmp_path):
    began = time.monotonic()
    assert ranks(2, close_immediately, model_folder("qwen3", True), str(tmp_path)) == [([], None)] * 2
    assert time.monotonic() - began < 250 and not list(tmp_path.iterdir())


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

    from megatron_g2rl.policy.checkpoint.checkpoints import verify

    checkpoints, ballast = Path(disk, "checkpoints"), Path(disk, "ballast")
    policy = make_policy(folder, dict(tensor_parallel=2))
    saves = open_checkpoints(policy, checkpoints, keep=2, asynchronous=asynchronous)

    def save(step: int):
        saves.save(step, {"step": step})
        return saves.finish(wait=True)

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
    state = load_policy(policy, checkpoints / "step_00000001")
    assert not differing(export(policy), weights) and state == {"step": 1}
    return messages, save(4).name


@ASYNCHRONOUS
def test_a_full_disk_fails_only_the_save_and_with_one_message(asynchronous, ranks, model_folder, small_disk):
    first, second = ranks(2, fill_the_disk, model_folder("qwen3", True), str(small_disk), asynchronous)
    assert first == second
    messages, after = first
    for step, message in zip((2, 3), messages, strict=True):
        for words in ("CheckpointNotWritten", f"step {step} ", str(small_disk), "No space left", "free disk"):
            assert words in message
    assert after == "step_00000004"
