"""Worker process of the reward pool: `python -m megatron_g2rl.rewards.worker FD MEMORY PARENT`.

It reads the functions and then calls from the socket FD, and writes one message per response. It starts from a bare
interpreter and thus has no threads, locks or imports of the trainer. It outlives the trainer by at most the deadline
plus one second: it exits, together with processes that a reward function started, when its socket closes and on the
kernel's signal that the parent has ended; an alarm ends it inside C code, where no signal handler can run.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Awaitable
from multiprocessing.connection import Connection
from typing import Any

import psutil

from megatron_g2rl.distributed.orphans import adopt_orphans, signal_when_parent_ends
from megatron_g2rl.rewards import contract
from megatron_g2rl.rewards.contract import (
    ContractError,
    RewardFunction,
    load_function,
    read_form,
    read_result,
    split_batch,
)
from megatron_g2rl.rewards.verifier import MATH_REWARD, prepare

ALARM_GRACE_S = 1.0
"""Seconds past the deadline after which a worker ends itself, because the parent failed to kill it."""
CLOSE_S = 5.0
"""Time limit in seconds for the `close` methods of reward functions."""
OUT_OF_MEMORY = 71
"""Exit code of a worker that reached its memory limit (EX_OSERR)."""


def main(arguments: list[str]) -> None:
    """Load the reward functions, describe them, and call them until the parent closes the socket."""
    descriptor, memory_bytes, parent = arguments
    # Ctrl-C in the terminal, and Slurm's signals, reach every process; the parent handles them and closes the workers.
    # Handlers, unlike SIG_IGN, are not inherited by programs that a reward function starts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, _end)
    signal_when_parent_ends(int(parent), signal.SIGUSR2)
    # Limits data, not address space: mapping a large shared library (a CUDA build of torch) does not use memory.
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(int(descriptor))
    adopt_orphans()  # processes that a reward function leaves behind end with this process
    worker = _Worker(connection)
    if worker.load(json.loads(connection.recv_bytes())):
        worker.serve()


def _end(*_: object) -> None:
    """Kill all processes that the reward function started, and exit; used when the parent has ended."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


class _Worker:
    """The functions of this process and the socket to its parent."""

    def __init__(self, connection: Connection):
        self._connection, self._pid = connection, os.getpid()
        self._functions: list[RewardFunction] = []
        self._bounded: list[bool] = []
        self._deadlines: list[float] = []
        self._loop: asyncio.Runner | None = None
        self._started = 0.0

    def load(self, specs: list[dict[str, Any]]) -> bool:
        """Load the functions and report to the parent; False if one cannot be used."""
        for spec in specs:
            try:
                self._functions.append(load_function(spec["function"], spec["arguments"], spec["deadline_s"]))
                if spec["function"] == MATH_REWARD:
                    prepare()
            except BaseException as error:
                detail = str(error) if isinstance(error, ContractError) else _describe_error(error)
                self._send({"refused": detail, "function": spec["function"]})
                return False
            self._bounded.append(spec["bounded"])
            self._deadlines.append(spec["deadline_s"])
        self._send({"ready": [_description(function) for function in self._functions]})
        return True

    def serve(self) -> None:
        """Process calls until the parent closes the socket."""
        while True:
            try:
                work = json.loads(self._connection.recv_bytes())
            except EOFError:
                self._close()
                raise
            self._start_alarm(self._deadlines[work["function"]])
            if "batch" in work:
                self._call_batch(work["function"], work["jobs"], *work["batch"])
            elif self._functions[work["function"]].is_async:
                self._run(self._gather(work["function"], work["jobs"], work["calls"]))
            else:
                for job, (positional, keywords) in zip(work["jobs"], work["calls"], strict=True):
                    self._start_alarm(self._deadlines[work["function"]])
                    self._answer(work["function"], job, *self._attempt(work["function"], positional, keywords))
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _start_alarm(self, deadline_s: float) -> None:
        # Without a handler, the kernel ends the process, even inside C code.
        signal.setitimer(signal.ITIMER_REAL, deadline_s + ALARM_GRACE_S)
        self._started = time.monotonic()

    def _attempt(self, place: int, positional: list, keywords: dict) -> tuple[Any, str]:
        """Call a function and await it if needed; returns (value, "") or (None, error message)."""
        try:
            value = self._functions[place].call(*positional, **keywords)
            return (self._run(value) if inspect.isawaitable(value) else value), ""
        except BaseException as error:
            return None, self._error_of(error)

    async def _gather(self, place: int, jobs: list[int], calls: list) -> None:
        """Await the calls of an async function concurrently; each result is sent as soon as it is available."""

        async def answer(job: int, positional: list, keywords: dict) -> None:
            try:
                value, error = await self._functions[place].call(*positional, **keywords), ""
            except BaseException as raised:
                value, error = None, self._error_of(raised)
            self._answer(place, job, value, error)

        await asyncio.gather(*(answer(job, *call) for job, call in zip(jobs, calls, strict=True)))

    def _call_batch(self, place: int, jobs: list[int], positional: list, keywords: dict) -> None:
        value, error = self._attempt(place, positional, keywords)
        values: list[Any] = [None] * len(jobs)
        if not error:
            try:
                values = split_batch(value, len(jobs))
            except Exception as raised:
                error = str(raised) if isinstance(raised, ContractError) else _describe_error(raised)
        for job, one in zip(jobs, values, strict=True):
            self._answer(place, job, one, error)

    def _run(self, awaitable: Awaitable[Any]) -> Any:
        """Await in the single event loop of this process, so that sessions of HTTP clients stay usable."""

        async def wait() -> Any:
            return await awaitable

        self._loop = self._loop or asyncio.Runner()
        return self._loop.run(wait())

    def _answer(self, place: int, job: int, value: Any, error: str) -> None:
        """Send the outcome of one response."""
        message: dict[str, Any] = {"item": job, "seconds": time.monotonic() - self._started}
        if not error:
            try:
                message["reward"], message["correct"] = read_result(value, self._bounded[place])
                message["form"] = read_form(value)
            except ContractError as raised:
                error = str(raised)
        self._send(message | ({"error": error} if error else {}))

    def _error_of(self, error: BaseException) -> str:
        if isinstance(error, MemoryError):
            # The state of this process is unreliable after running out of memory; the parent counts a crash.
            os._exit(OUT_OF_MEMORY)
        return _describe_error(error)

    def _send(self, message: dict) -> None:
        if os.getpid() != self._pid:
            os._exit(0)  # the reward function forked, and the child returned too
        self._connection.send_bytes(json.dumps(message).encode())

    def _close(self) -> None:
        """Call the `close` methods; their exceptions are only printed."""
        signal.setitimer(signal.ITIMER_REAL, CLOSE_S)
        for function in self._functions:
            if function.close is not None:
                try:
                    value = function.close()
                    if inspect.isawaitable(value):
                        self._run(value)
                except Exception:
                    traceback.print_exc()


def _description(function: RewardFunction) -> dict[str, Any]:
    return {
        "parameters": function.parameters,
        "is_async": function.is_async,
        "closes": function.close is not None,
    }


def _describe_error(error: BaseException) -> str:
    """The exception and its stack frames in the user's files."""
    text = "".join(traceback.format_exception_only(error)).strip()
    ours = (__file__, contract.__file__, importlib.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if frame.filename not in ours and "<frozen" not in frame.filename]
    frames = [frame for frame in frames if not frame.filename.startswith(os.path.dirname(asyncio.__file__))]
    return "\n".join([text, *(f"  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames)])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (EOFError, ConnectionError):
        # The parent closed the pool or has ended.
        _end()
