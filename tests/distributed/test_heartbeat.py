"""The other ranks name a rank whose process is stopped, but not one that is only slow."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import time

import pytest
import torch.distributed as dist

from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.distributed.heartbeat import SILENCE_VARIABLE, Heartbeat
from megatron_g2rl.errors import UserError
from megatron_g2rl.policy import runtime


def stop_one(rank: int, stopped: int, seconds: str):
    """What the other ranks report, and the host and process of the stopped rank."""
    os.environ[SILENCE_VARIABLE] = seconds
    runtime.start(PolicyConfig(device="cpu"), seed=0)
    pids: list = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    reports: queue.SimpleQueue = queue.SimpleQueue()
    heartbeat = Heartbeat(lambda *report: reports.put(report))
    if rank == stopped:
        time.sleep(1)  # until the others have detected it
        os.kill(os.getpid(), signal.SIGSTOP)
        heartbeat.stop()
        return None
    try:
        report = reports.get(timeout=40)
    finally:
        os.kill(pids[stopped], signal.SIGCONT)
    heartbeat.stop()
    return report, f"(process {pids[stopped]} on {socket.gethostname()})"


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_is_named_with_its_process_and_host(stopped, ranks):
    (named, message), place = ranks(2, stop_one, stopped, "2")[1 - stopped]
    assert named == stopped and f"rank {stopped} {place} did not run for 2 s" in message


def stay_busy(rank: int):
    """Reports of a 4 s watchdog while the main thread of rank 1 computes for 6 s."""
    os.environ[SILENCE_VARIABLE] = "4"
    runtime.start(PolicyConfig(device="cpu"), seed=0)
    reports: list = []
    with Heartbeat(lambda *report: reports.append(report)):
        until = time.monotonic() + 6
        while rank == 1 and time.monotonic() < until:
            re.match("(a+)+b", "a" * 12)
        dist.barrier()
    return reports


def test_a_rank_that_is_only_slow_is_not_reported(ranks):
    assert ranks(2, stay_busy) == [[], []]


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_the_environment_variable_must_be_a_positive_number_of_seconds(text, monkeypatch):
    monkeypatch.setenv(SILENCE_VARIABLE, text)
    with pytest.raises(UserError, match=f"{SILENCE_VARIABLE}={text}"):
        Heartbeat()
