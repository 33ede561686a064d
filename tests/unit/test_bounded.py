"""Code out of a file, such as a chat template, takes no more time and memory than it is given."""

from __future__ import annotations

import itertools
import resource
import signal
import threading

import pytest

from megatron_g2rl.data.bounded import bounded


def test_what_does_not_end_is_stopped():
    with pytest.raises(TimeoutError, match=r"no end after 0\.1 s"), bounded(0.1, 1 << 30):
        sum(0 for _ in itertools.repeat(0))


def test_what_takes_too_much_memory_is_stopped():
    with pytest.raises(MemoryError), bounded(60, 1 << 30):
        "x" * 10**11


def test_limits_and_timers_are_as_before():
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    timer = signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        with bounded(60, 1 << 30):
            assert resource.getrlimit(resource.RLIMIT_AS)[0] != limits[0]
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == (limits, handler)


def test_in_another_thread_the_memory_alone_is_bounded():
    found = []

    def work():
        try:
            with bounded(60, 1 << 30):
                found.append("x" * 10**11)
        except MemoryError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], MemoryError)
