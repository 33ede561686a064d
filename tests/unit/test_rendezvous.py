"""Ranks find each other within a bounded time, among other runs, and report missing ranks."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time

import pytest

from megatron_g2rl.distributed import rendezvous
from megatron_g2rl.distributed.ranks import reserve_port
from megatron_g2rl.errors import UserError

RESERVED = []


def free_port() -> int:
    RESERVED.append(reserve_port())
    return RESERVED[-1].getsockname()[1]


def test_a_reserved_port_goes_to_nobody_but_a_store():
    with reserve_port() as reserving, socket.socket() as other, reserve_port() as second:
        port = reserving.getsockname()[1]
        assert second.getsockname()[1] != port
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        with rendezvous._listen(str(port)), pytest.raises(UserError, match="another process uses that port"):
            rendezvous._listen(str(port))


def meet(queue, barrier, place: int, rank: int, world: int, port: int, identity: str, hold: float) -> None:
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC", "SLURM"))]:
        del os.environ[name]
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ[rendezvous.TIMEOUT_VARIABLE] = "8"
    barrier.wait()
    start = time.monotonic()
    try:
        store = rendezvous.meet(identity)
        store.set(f"done {rank}", "1")
        message = "met"
        queue.put((place, message, time.monotonic() - start))
        time.sleep(hold)
    except UserError as error:
        queue.put((place, str(error), time.monotonic() - start))


def together(port: int, ranks: list[tuple], hold: float = 1.0) -> list[tuple[str, float]]:
    """Result of each `(rank, world, identity)`, and the seconds that it took."""
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(len(ranks))
    processes = [
        context.Process(target=meet, args=(queue, barrier, place, rank, world, port, identity, hold))
        for place, (rank, world, identity) in enumerate(ranks)
    ]
    for process in processes:
        process.start()
    messages = {place: (text, took) for place, text, took in (queue.get(timeout=60) for _ in processes)}
    for process in processes:
        process.join(30)
    return [messages[place] for place in range(len(ranks))]


def test_ranks_of_a_run_meet():
    assert [text for text, _ in together(free_port(), [(r, 3, "run") for r in range(3)])] == ["met"] * 3


def test_a_single_rank_needs_no_port(monkeypatch):
    monkeypatch.setenv("RANK", "0"), monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv(rendezvous.ALONE, str(os.getpid())), monkeypatch.setenv("MASTER_PORT", "not a port")
    rendezvous.meet("run").set("a", "b")


def test_a_child_of_a_single_rank_is_not_a_single_rank(monkeypatch):
    monkeypatch.setenv(rendezvous.ALONE, str(os.getpid()))
    (first, _), (other, _) = together(free_port(), [(0, 3, "run"), (1, 3, "run")])
    assert "1 of 3 ranks did not connect" in first and "found no rank 0" in other


def test_missing_ranks_are_reported_within_the_timeout():
    (first, took), (other, _) = together(free_port(), [(0, 4, "run"), (2, 4, "run")])
    assert "2 of 4 ranks did not connect" in first and "rank 1, 3" in first and took < 60
    assert "found no rank 0" in other


def test_a_rank_of_another_run_is_not_admitted():
    messages = together(free_port(), [(0, 2, "mine"), (1, 2, "mine"), (1, 2, "yours")], hold=20)
    assert [text for text, _ in messages[:2]] == ["met", "met"]
    assert "another run uses that port" in messages[2][0]


def test_two_runs_on_one_port_do_not_mix():
    port = free_port()
    ranks = [(0, 2, "mine"), (1, 2, "mine"), (0, 2, "yours"), (1, 2, "yours")]
    messages = [text for text, _ in together(port, ranks, hold=20)]
    met = [place for place, text in enumerate(messages) if text == "met"]
    assert met in ([0, 1], [2, 3]), messages
    assert sum("uses that port" in text for text in messages) == 2


def test_a_duplicate_rank_is_refused():
    messages = together(free_port(), [(0, 3, "run"), (1, 3, "run"), (1, 3, "run")])
    assert sum("was started twice" in text for text, _ in messages) == 1


def test_a_port_of_another_program_is_reported():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(8)
        messages = together(taken.getsockname()[1], [(0, 2, "run"), (1, 2, "run")])
    assert "another process uses that port" in messages[0][0] and "MASTER_PORT" in messages[0][0]
    assert "rank 1 of 2" in messages[1][0] and messages[1][1] < 60


def test_ranks_of_one_machine_listen_only_on_the_loopback(monkeypatch):
    port = free_port()
    listening = rendezvous._listen(str(port))
    try:
        assert listening.getsockname()[0] == "127.0.0.1"
    finally:
        listening.close()
