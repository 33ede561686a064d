"""The other ranks name a rank whose process is stopped, but not one that is only slow."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import threading
import time

import pytest
import torch.distributed as dist

from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.distributed import heartbeat
from megatron_g2rl.distributed.heartbeat import SILENCE_VARIABLE, Heartbeat
from megatron_g2rl.errors import UserError
from megatron_g2rl.policy import runtime

pytestmark = pytest.mark.same_for_both


def stop_one(rank: int, stopped: int, seconds: str):
    """What the other ranks report, and the host and process of the stopped rank."""
    os.environ[SILENCE_VARIABLE] = seconds
    runtime.start(PolicyConfig(device="cpu"), seed=0)
    pids: list = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    reports: queue.SimpleQueue = queue.SimpleQueue()
    watch = Heartbeat(lambda *report: reports.put(report))
    if rank == stopped:
        time.sleep(1)  # until the others have detected it
        os.kill(os.getpid(), signal.SIGSTOP)
        watch.stop()
        return None
    try:
        report = reports.get(timeout=200)
    finally:
        os.kill(pids[stopped], signal.SIGCONT)
    watch.stop()
    return report, f"(process {pids[stopped]} on {socket.gethostname()})"


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_with_its_process_and_host(stopped, ranks):
    (named, message), place = ranks(2, stop_one, stopped, "2")[1 - stopped]
    assert named == stopped and f"rank {stopped} {place} did not run for 2 s" in message


def stay_busy(rank: int):
    """Reports while the main thread of rank 1 computes, and whether its heartbeats continued meanwhile."""
    os.environ[SILENCE_VARIABLE] = "60"
    heartbeat.BEAT_S = 0.2
    runtime.start(PolicyConfig(device="cpu"), seed=0)
    reports: list = []
    with Heartbeat(lambda *report: reports.append(report)) as beating:
        until = time.monotonic() + 50
        while rank == 1 and beating._rounds < 10 and time.monotonic() < until:
            re.match("(a+)+b", "a" * 12)
        continued = rank == 0 or beating._rounds >= 10
        dist.barrier()
    return reports, continued


def test_a_rank_that_is_only_slow_is_not_reported(ranks):
    assert ranks(2, stay_busy) == [([], True)] * 2


class Beats(threading.Event):
    """An event that is set after `count` waits, which take no time."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def wait(self, timeout=None) -> bool:
        self.count -= 1
        return self.is_set() or self.count < 0


@pytest.mark.parametrize(("last", "reported"), [(1000, []), (500, [1])], ids=["beating", "silent"])
def test_a_rank_is_reported_only_if_its_counter_stays_the_same(last, reported):
    class Store(dict):
        reads = 0

        def check(self, keys) -> bool:
            return True

        def get(self, key) -> bytes:
            if key.startswith("place"):
                return b"host 1 0.0"
            self.reads += 1
            return str(min(self.reads, last)).encode()

        def set(self, key, value) -> None:
            self[key] = value

    reports: list = []
    watch = object.__new__(Heartbeat)
    watch._rank, watch._watched, watch._seconds, watch._beat_s, watch._rounds = 0, [1], 60.0, 0.2, 0
    watch._store, watch._stopped, watch._locations = Store(), Beats(1000), {}
    watch._on_silence = lambda rank, message: reports.append(rank)
    watch._count()
    assert reports == reported and watch._store["beat 0"] == str(watch._rounds)
    assert watch._rounds == (1000 if last == 1000 else 500 + 301)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_the_environment_variable_must_be_a_positive_number_of_seconds(text, monkeypatch):
    monkeypatch.setenv(SILENCE_VARIABLE, text)
    with pytest.raises(UserError, match=f"{SILENCE_VARIABLE}={text}"):
        Heartbeat()


def test_a_watching_rank_ends_even_if_it_cannot_report_the_silent_one(monkeypatch):
    def fail(*_) -> None:
        raise BrokenPipeError

    codes: list[int] = []
    monkeypatch.setattr(heartbeat, "write_message", fail), monkeypatch.setattr(os, "_exit", codes.append)
    with pytest.raises(BrokenPipeError):
        object.__new__(Heartbeat)._end_process(1, "rank 1 did not run")
    assert codes == [1]
