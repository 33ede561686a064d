"""Judges responses in worker processes that are killed at a hard deadline.

Some answers make a verifier compute for ever, crash, or eat the memory of the node; each such answer costs its own
worker and nothing else. What it leaves out: threads (a verifier in C cannot be stopped in one) and `multiprocessing`
(its workers run the parent's `__main__` again, or are forked out of a process that holds torch's and vLLM's threads).
docs/rewards.md compares it with the library that comes nearest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from signal import SIGALRM, SIGKILL

import psutil

from megatron_g2rl.errors import UserError

MEMORY_BYTES = 4 * 2**30
"""Memory one worker may allocate."""
START_S = 120.0
"""Seconds a worker may take to start and to import the reward function."""
CHUNK = 16
"""Most answers handed to a worker at a time: enough that messages cost nothing, few enough to share work out."""
MOST_LOST_STARTS = 3
"""Replacements of a worker that may end before they are ready, one after another: the machine may be out of memory."""
FAILED_REWARD = -1.0
"""Reward of an answer whose worker was killed at the deadline or died."""

logger = logging.getLogger(__name__)


class RewardError(UserError):
    """The reward function cannot be loaded, raised an exception, or returned no number in [-1, 1]."""


@dataclass(frozen=True)
class RewardResult:
    """What the pool says of a batch of responses; every list is in the order of the items."""

    rewards: list[float]
    """Reward of each response, in [-1, 1]; `FAILED_REWARD` where the answer timed out or its worker died."""
    timed_out: list[bool]
    """Whether the answer's worker was killed at the deadline."""
    died: list[bool]
    """Whether the answer's worker died under it (a crash, an exit, the memory limit)."""
    answer_seconds: list[float]
    """Wall seconds each answer took in its worker."""
    seconds: float
    """Wall seconds of the whole batch."""

    def metrics(self) -> dict[str, float]:
        """Counts of time-outs and deaths, seconds of the batch, and seconds per answer (largest and mean)."""
        return {
            "timeouts": sum(self.timed_out),
            "deaths": sum(self.died),
            "seconds": self.seconds,
            "answer_seconds_max": max(self.answer_seconds, default=0.0),
            "answer_seconds_mean": sum(self.answer_seconds) / max(len(self.answer_seconds), 1),
        }


class RewardPool:
    """Worker processes that apply one reward function; a context manager.

    Args:
        function: `package.module:name` of a function `(response_text: str, answer: str) -> float` in [-1, 1].
        workers: number of processes.
        deadline_s: wall seconds one answer may take before its worker is killed.

    Raises:
        RewardError: the function cannot be imported or called (`reward.function` in the configuration).
    """

    def __init__(self, function: str, workers: int, deadline_s: float) -> None:
        if not all(function.partition(":")):
            raise RewardError(f"reward.function: {function!r} is not of the form package.module:name")
        if workers < 1 or deadline_s <= 0:
            raise RewardError(f"reward.workers ({workers}) and reward.deadline_s ({deadline_s}) must be above 0")
        self._function, self._deadline_s = function, deadline_s
        self._workers: list[_Worker] = []
        self._disturbed: set[int] = set()
        """Items of the batch that were put back."""
        self._lost_starts, self._allowed_losses = 0, 0
        """Replacements that ended before they were ready, one after another, and how many may."""
        try:
            self._workers.extend(_Worker(function, deadline_s) for _ in range(workers))
            while any(worker.starting for worker in self._workers):
                self._advance({}, deque())
            self._allowed_losses = MOST_LOST_STARTS
        except BaseException:
            self.close()
            raise

    def judge(self, items: Sequence[tuple[str, str]]) -> RewardResult:
        """Rewards of (response text, reference answer) pairs, in their order; one call at a time.

        Raises:
            RewardError: after the whole batch, when the function raised or returned no number in [-1, 1] for some item;
                it names the first such item and carries the worker's traceback.
        """
        if not self._workers:
            raise RewardError("the reward pool is closed")
        start = time.monotonic()
        pending, outcomes, self._disturbed = deque(range(len(items))), {}, set()
        try:
            while len(outcomes) < len(items):
                self._hand_out(items, pending)
                self._advance(outcomes, pending)
        finally:
            # After an interrupt, what a busy worker would still answer belongs to no later batch.
            self._replace([worker for worker in self._workers if worker.indices])
        ordered = [outcomes[index] for index in range(len(items))]
        self._raise_errors(items, ordered)
        result = RewardResult(
            rewards=[outcome.reward for outcome in ordered],
            timed_out=[outcome.timed_out for outcome in ordered],
            died=[outcome.died for outcome in ordered],
            answer_seconds=[outcome.seconds for outcome in ordered],
            seconds=time.monotonic() - start,
        )
        if any(result.timed_out) or any(result.died):
            logger.warning(
                "%d of %d answers ran past reward.deadline_s (%g s), %d killed their worker; all these are wrong",
                *(sum(result.timed_out), len(items), self._deadline_s, sum(result.died)),
            )
        return result

    def close(self) -> None:
        """End the workers; may be called twice."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hand_out(self, items: Sequence[tuple[str, str]], pending: deque[int]) -> None:
        """Give every idle worker a chunk; chunks shrink towards the end so that the workers finish together."""
        for worker in [worker for worker in self._workers if worker.idle]:
            size = min(CHUNK, -(-len(pending) // (2 * len(self._workers))))
            if size == 0:
                return
            if worker.process.poll() is not None:
                self._replace([worker])
                continue
            worker.give([pending.popleft() for _ in range(size)], items, self._deadline_s)

    def _advance(self, outcomes: dict[int, _Outcome], pending: deque[int]) -> None:
        """Wait for the next message or deadline and record what it means."""
        waiting = {worker.connection: worker for worker in self._workers if not worker.idle}
        due = min(worker.due for worker in waiting.values())
        for connection in wait(list(waiting), max(due - time.monotonic(), 0.0)):
            self._read(waiting.pop(connection), outcomes, pending)
        for worker in waiting.values():
            # What has arrived by now was in time, however late we look.
            if worker.due <= time.monotonic() and not worker.connection.poll():
                if worker.starting:
                    raise RewardError(f"reward.function: no worker with {self._function} after {START_S:.0f} s")
                if not (worker.is_stopped() and self._put_back(worker, pending)):
                    self._lose(worker, outcomes, pending, _Outcome(seconds=self._deadline_s, timed_out=True))

    def _read(self, worker: _Worker, outcomes: dict[int, _Outcome], pending: deque[int]) -> None:
        try:
            message = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            code = worker.reap()
            if worker.starting and self._lost_starts >= self._allowed_losses:
                raise RewardError(
                    f"reward.function: a worker ended (code {code}) while it imported {self._function}"
                ) from None
            if worker.starting:
                self._lost_starts += 1
                self._replace([worker])
                return
            if code == -SIGKILL and self._put_back(worker, pending):
                return
            seconds = time.monotonic() - worker.due + self._deadline_s
            alarmed = code == -SIGALRM
            self._lose(worker, outcomes, pending, _Outcome(seconds=seconds, timed_out=alarmed, died=not alarmed))
            return
        if "refused" in message:
            raise RewardError(f"reward.function: {self._function} cannot be used: {message['refused']}")
        if "ready" in message:
            worker.starting, self._lost_starts = False, 0
            return
        item = message.pop("item")
        if not worker.indices or item != worker.indices[0]:
            logger.warning("reward.function: an answer to no question (item %d) was dropped", item)
            return
        outcomes[worker.indices.popleft()] = _Outcome(**message)
        worker.due = time.monotonic() + self._deadline_s

    def _lose(self, worker: _Worker, outcomes: dict[int, _Outcome], pending: deque[int], outcome: _Outcome) -> None:
        """Record the answer that cost a worker, put the rest of its chunk back, and start another worker."""
        outcomes[worker.indices.popleft()] = outcome
        pending.extendleft(reversed(worker.indices))
        self._replace([worker])

    def _put_back(self, worker: _Worker, pending: deque[int]) -> bool:
        """Let another worker answer when this one was killed or stopped, such as by the kernel for memory.

        Returns:
            Whether it is put back: once for each answer, which may be the reason after all.
        """
        if worker.indices[0] in self._disturbed:
            return False
        self._disturbed.add(worker.indices[0])
        pending.extendleft(reversed(worker.indices))
        self._replace([worker])
        return True

    def _replace(self, workers: list[_Worker]) -> None:
        for worker in workers:
            worker.kill()
            self._workers[self._workers.index(worker)] = _Worker(self._function, self._deadline_s)

    def _raise_errors(self, items: Sequence[tuple[str, str]], outcomes: list[_Outcome]) -> None:
        failed = [index for index, outcome in enumerate(outcomes) if outcome.error]
        if failed:
            text, answer = items[failed[0]]
            raise RewardError(
                f"reward.function: {self._function} failed for {len(failed)} of {len(items)} responses, first for item "
                f"{failed[0]} (answer {answer!r:.80}, response ends {text[-80:]!r}): {outcomes[failed[0]].error}"
            )


@dataclass(frozen=True)
class _Outcome:
    """What became of one item."""

    seconds: float
    reward: float = FAILED_REWARD
    timed_out: bool = False
    died: bool = False
    error: str = ""


@dataclass(eq=False)
class _Worker:
    """A worker process as its parent sees it."""

    function: str
    deadline_s: float
    starting: bool = True
    indices: deque[int] = field(default_factory=deque)
    """Items it was given and has not answered, the one it works on first."""
    due: float = 0.0
    """Monotonic time at which its present item, or its start, is late."""
    process: subprocess.Popen = field(init=False)
    connection: Connection = field(init=False)

    def __post_init__(self) -> None:
        ours, theirs = socket.socketpair()
        descriptor = str(theirs.fileno())
        limits = [str(self.deadline_s), str(MEMORY_BYTES), str(os.getpid())]
        # The worker finds modules where this process does and, last, in the current folder (-P: not first).
        folders = [*(entry or os.getcwd() for entry in sys.path), os.getcwd()]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "megatron_g2rl.rewards.worker", descriptor, self.function, *limits],
                stdin=subprocess.DEVNULL, env=environment, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        self.connection = Connection(ours.detach())
        self.due = time.monotonic() + START_S

    @property
    def idle(self) -> bool:
        return not self.starting and not self.indices

    def give(self, indices: list[int], items: Sequence[tuple[str, str]], deadline_s: float) -> None:
        self.indices.extend(indices)
        try:
            self.connection.send_bytes(json.dumps([(index, *items[index]) for index in indices]).encode())
        except OSError:
            # It died while it read; the closed socket says so at the next look.
            pass
        self.due = time.monotonic() + deadline_s

    def is_stopped(self) -> bool:
        return self.process.poll() is None and psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED

    def reap(self) -> int:
        """The exit code of a worker that has ended; what it started in its session ends now."""
        # Before its process id is given back, and may become another process's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, SIGKILL)
        return self.process.wait()

    def kill(self) -> None:
        self.connection.close()
        if self.process.poll() is None:
            # It leads a session of its own: what a reward function started goes with it, with a session or without.
            started = _descendants(self.process.pid)
            os.killpg(self.process.pid, SIGKILL)
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
