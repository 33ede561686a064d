"""One worker process of the reward pool: `python -m megatron_g2rl.rewards.worker FD FUNCTION DEADLINE MEMORY PARENT`.

It reads chunks of [text, answer] pairs from the socket FD and writes one message for each pair. It starts from a bare
interpreter, so it shares no thread, lock or import with the trainer, and it never outlives it by more than the deadline
and a second: it ends, and what the reward function has started with it, when its socket closes and on the kernel's
signal that the parent has ended; an alarm ends it inside a computation in C, where no signal handler can run.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import numbers
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

import psutil

from megatron_g2rl.orphans import adopt_orphans, signal_when_parent_ends

ALARM_GRACE_S = 1.0
"""Seconds past the deadline after which a worker ends itself: the parent, which kills it there, is gone or stuck."""
OUT_OF_MEMORY = 75
"""Exit code of a worker that reached its memory limit."""


def main(arguments: list[str]) -> None:
    """Load the reward function, say so, and judge until the parent closes the socket."""
    descriptor, path, deadline_s, memory_bytes, parent = arguments
    # Ctrl-C in the terminal, and Slurm's signals, reach every process; the parent decides what they mean and closes the
    # workers. Handlers, unlike SIG_IGN, are not inherited by programs that a reward function starts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, _end)
    signal_when_parent_ends(int(parent), signal.SIGUSR2)
    # Of data, not of address space: mapping a large shared library (a CUDA build of torch) is no use of memory.
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(int(descriptor))
    adopt_orphans()  # what a reward function starts, and loses, ends with this process
    own = os.getpid()
    try:
        function = _load(path)
    except BaseException as error:
        detail = str(error) if isinstance(error, _LoadError) else _told(error)
        _send(connection, {"refused": detail})
        return
    _send(connection, {"ready": True})
    while True:
        for item, text, answer in json.loads(connection.recv_bytes()):
            # Without a handler the kernel ends the process, even inside a computation in C.
            signal.setitimer(signal.ITIMER_REAL, float(deadline_s) + ALARM_GRACE_S)
            judged = _judge(function, text, answer)
            if os.getpid() != own:
                os._exit(0)  # the reward function forked, and its copy came back, too
            _send(connection, {"item": item} | judged)
            signal.setitimer(signal.ITIMER_REAL, 0)


def _end(*_: object) -> None:
    """End all that the reward function has started, and this process; the parent, which would do so, has ended."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


class _LoadError(Exception):
    """What is wrong with `reward.function`, in a sentence."""


def _load(path: str) -> Callable[[str, str], float]:
    module_name, _, name = path.partition(":")
    module = importlib.import_module(module_name)
    try:
        function = getattr(module, name)
    except AttributeError:
        raise _LoadError(f"module {module_name} ({module.__file__}) has no function {name}") from None
    if not callable(function):
        raise _LoadError(f"{name} in {module_name} is a {type(function).__name__}, not a function")
    from megatron_g2rl.rewards.verifier import math_reward, prepare

    if function is math_reward:
        prepare()
    return function


def _told(error: BaseException) -> str:
    """What was raised, and where in the user's own files."""
    told = "".join(traceback.format_exception_only(error)).strip()
    ours = (__file__, importlib.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if frame.filename not in ours and "<frozen" not in frame.filename]
    return "\n".join([told, *(f"  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames)])


def _judge(function: Callable[[str, str], float], text: str, answer: str) -> dict:
    start = time.monotonic()
    try:
        reward = function(text, answer)
    except MemoryError:
        # What is left of this process cannot be trusted to go on; the parent counts a death.
        os._exit(OUT_OF_MEMORY)
    except BaseException as error:
        return {"error": _told(error), "seconds": time.monotonic() - start}
    seconds = time.monotonic() - start
    try:
        value = float(reward) if isinstance(reward, numbers.Real) else math.nan
        shown = f"{reward!r:.200}"
    except BaseException as error:  # code of the user's, too
        return {"error": f"what it returned cannot be read as a number: {_told(error)}", "seconds": seconds}
    if not -1.0 <= value <= 1.0:
        return {"error": f"it returned {shown}; a reward is a number in [-1, 1]", "seconds": seconds}
    return {"reward": value, "seconds": seconds}


def _send(connection: Connection, message: dict) -> None:
    connection.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (EOFError, ConnectionError):
        # The parent closed the pool, or has ended.
        _end()
