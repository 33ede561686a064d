"""A checkpoint worker that is killed or stopped loses only its checkpoint."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from megatron_g2rl.policy.checkpoint import writer as checkpoint_worker
from megatron_g2rl.policy.checkpoint.writer import BackgroundWrite, Outcome, ShardWriter


class Signaled:
    """Stand-in for a `ShardWriter`: its process receives a signal while it writes."""

    def __init__(self, number: signal.Signals):
        self.number = number

    def write(self, parent: int, result) -> None:
        os.kill(os.getpid(), self.number)
        result.put(checkpoint_worker.Outcome())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stays_stopped_ends_the_wait_with_an_error(number, monkeypatch):
    monkeypatch.setattr(checkpoint_worker, "STOPPED_S", 0.6)
    monkeypatch.setattr(checkpoint_worker, "POLL_S", 0.2)
    write = BackgroundWrite(Signaled(number), asynchronous=True)
    assert write.done(wait=True)
    assert "killed" in write.result.get().error


def test_the_worker_has_one_thread(monkeypatch):
    """A parallel region would wait forever for the threads of its parent, which fork does not copy."""
    monkeypatch.setattr(ShardWriter, "_write", lambda self: Outcome(error=str(torch.get_num_threads())))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        write = BackgroundWrite(ShardWriter(None, None, None, None, {}, {}), asynchronous=True)
        assert write.done(wait=True)
        assert write.result.get().error == "1"
    finally:
        torch.set_num_threads(threads)
