"""Scores responses in worker processes that are killed at a hard deadline.

Some answers make a verifier run forever, crash, or exhaust the memory of the node; each such answer costs only its own
worker. Deliberately not used: threads (a verifier in C cannot be stopped in one) and `multiprocessing` (its workers run
the parent's `__main__` again, or are forked from a process with torch's and vLLM's threads). docs/rewards.md compares
the pool with the closest library.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from signal import SIGALRM, SIGKILL
from typing import Any

from megatron_g2rl.rewards.binding import Binding, BindingError, Sample, bind, possible_columns
from megatron_g2rl.rewards.results import CHUNK, FAILED_REWARD, FunctionSpec, RewardError, RewardResult
from megatron_g2rl.rewards.worker_process import START_S, WorkerProcess

CLOSE_S = 6.0
"""Time limit in seconds for idle workers to close their reward functions."""
MAX_FAILED_STARTS = 3
"""Consecutive replacement workers that may die before they are ready, for example because memory ran out."""

logger = logging.getLogger(__name__)


class RewardPool:
    """Worker processes that apply one or several reward functions; a context manager.

    Args:
        functions: `package.module:name` of a function that takes a response and a reference answer, or several
            functions (docs/rewards.md lists what they can take and return).
        workers: number of processes; each loads all functions.
        deadline_s: wall-clock seconds per call, after which its worker is killed.
        key: configuration key of the functions, for messages.

    Raises:
        RewardError: a function cannot be imported, constructed or called.
    """

    def __init__(
        self,
        functions: str | Sequence[FunctionSpec],
        workers: int,
        deadline_s: float,
        key: str = "reward.function",
    ) -> None:
        self._key = key
        specs = [FunctionSpec(functions)] if isinstance(functions, str) else list(functions)
        for spec in specs:
            if not all(spec.function.partition(":")):
                raise RewardError(f"{self._key}: {spec.function!r} is not of the form package.module:name")
        if workers < 1 or deadline_s <= 0:
            raise RewardError(f"reward.workers ({workers}) and reward.deadline_s ({deadline_s}) must be above 0")
        self.specs = specs
        self._deadlines = [spec.deadline_s or deadline_s for spec in specs]
        self._functions: list[dict[str, Any]] = []
        """Description of each function, reported by a worker."""
        self._bindings: list[Binding] = []
        self._workers: list[WorkerProcess] = []
        self._requeued: set[int] = set()
        """Jobs of the batch that were requeued once."""
        self._alone: set[int] = set()
        """Jobs that must run alone, because a call with several jobs failed."""
        self._failed_starts, self._allowed_failed_starts = 0, 0
        """Consecutive workers that died before they were ready, and the limit."""
        try:
            self._workers.extend(WorkerProcess(self._setup()) for _ in range(workers))
            while any(worker.starting for worker in self._workers):
                self._advance({}, deque())
            self._allowed_failed_starts = MAX_FAILED_STARTS
        except BaseException:
            self.close()
            raise

    @property
    def possible_columns(self) -> set[str]:
        """Columns of the data that the functions may take; `binding.ALL_COLUMNS` for all of them."""
        return set().union(*(possible_columns(function["parameters"]) for function in self._functions))

    def bind(self, columns: Sequence[str] | set[str]) -> set[str]:
        """Bind the parameters of the functions, before the first response is scored.

        Args:
            columns: names of the data's columns.

        Returns:
            The columns that the functions require.

        Raises:
            RewardError: a required parameter is neither a known name nor a column.
        """
        bindings = []
        for spec, function in zip(self.specs, self._functions, strict=True):
            try:
                bindings.append(bind(function["parameters"], columns, frozenset(spec.arguments)))
            except BindingError as error:
                raise RewardError(f"{self._key}: {spec.function} cannot be called: {error}") from None
        self._bindings = bindings
        return set().union(*(binding.needed_columns for binding in bindings))

    def score(self, items: Sequence[Sample | tuple[str, str]]) -> RewardResult:
        """Results of the first function; see `score_all`."""
        return self.score_all(items)[0]

    def score_all(self, items: Sequence[Sample | tuple[str, str]]) -> list[RewardResult]:
        """Score responses with each function; returns one result per function. Not reentrant.

        Args:
            items: the responses; a pair is a response text and a reference answer.

        Raises:
            RewardError: after all responses, if a function raised or returned an invalid reward for some of them; names
                the first such item and includes the worker's traceback.
        """
        if not self._workers:
            raise RewardError("the reward pool is closed")
        if not self._bindings:
            self.bind(())
        start = time.monotonic()
        samples = [Sample(*item) for item in items]
        jobs = len(samples) * len(self.specs)
        pending, outcomes, self._requeued, self._alone = deque(range(jobs)), {}, set(), set()
        try:
            while len(outcomes) < jobs:
                self._hand_out(samples, pending)
                self._advance(outcomes, pending)
        finally:
            # After an interrupt, results of busy workers must not reach a later batch.
            self._replace([worker for worker in self._workers if worker.jobs])
        seconds = time.monotonic() - start
        ordered = [outcomes[job] for job in range(jobs)]
        parts = [ordered[i * len(samples) : (i + 1) * len(samples)] for i in range(len(self.specs))]
        for index, part in enumerate(parts):
            self._raise_errors(index, samples, part)
        return [self._result(index, part, seconds) for index, part in enumerate(parts)]

    def _result(self, place: int, outcomes: list[_Outcome], seconds: float) -> RewardResult:
        result = RewardResult(
            rewards=[outcome.reward for outcome in outcomes],
            correct=[outcome.correct for outcome in outcomes],
            forms=[outcome.form for outcome in outcomes],
            timed_out=[outcome.timed_out for outcome in outcomes],
            died=[outcome.died for outcome in outcomes],
            answer_seconds=[outcome.seconds for outcome in outcomes],
            seconds=seconds,
        )
        if any(result.timed_out) or any(result.died):
            which = f"{self.specs[place].function}: " if len(self.specs) > 1 else ""
            logger.warning(
                "%s%d of %d responses exceeded reward.deadline_s (%g s), %d crashed their worker; "
                "all of these count as incorrect",
                *(which, sum(result.timed_out), len(outcomes), self._deadlines[place], sum(result.died)),
            )
        return result

    def close(self) -> None:
        """Stop the workers; idempotent."""
        if any(function["closes"] for function in self._functions):
            idle = [worker for worker in self._workers if worker.idle]
            for worker in idle:
                worker.connection.close()
            until = time.monotonic() + CLOSE_S
            for worker in idle:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0.0, until - time.monotonic()))
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _setup(self) -> list[dict[str, Any]]:
        """Setup message of a worker: the functions to load."""
        return [
            {
                "function": spec.function,
                "arguments": dict(spec.arguments),
                "deadline_s": deadline_s,
                "bounded": spec.bounded,
            }
            for spec, deadline_s in zip(self.specs, self._deadlines, strict=True)
        ]

    def _hand_out(self, samples: Sequence[Sample], pending: deque[int]) -> None:
        """Give every idle worker some jobs; chunks shrink towards the end so that all workers finish together."""
        for worker in [worker for worker in self._workers if worker.idle]:
            if not pending:
                return
            if worker.process.poll() is not None:
                self._replace([worker])
                continue
            place = pending[0] // len(samples)
            jobs = self._next_jobs(pending, len(samples))
            chosen, binding = [samples[job % len(samples)] for job in jobs], self._bindings[place]
            if binding.is_batch:
                calls = {"batch": binding.batch_arguments(chosen)}
            else:
                calls = {"calls": [binding.arguments(sample) for sample in chosen]}
            work = {"function": place, "jobs": jobs} | calls
            worker.give(jobs, work, self._is_together(place), self._deadlines[place])

    def _next_jobs(self, pending: deque[int], count: int) -> list[int]:
        """Take the jobs of the next call or chunk; all belong to one function.

        Args:
            pending: jobs; job `function * count + index` scores response `index` with that function.
            count: number of responses.
        """
        first, place = pending[0], pending[0] // count
        if first in self._alone:
            return [pending.popleft()]
        together = self._is_together(place)
        most = self.specs[place].batch_size if together else CHUNK
        parts = len(self._workers) * (1 if together else 2)
        left = sum(job // count == place for job in islice(pending, most * parts))
        size = -(-left // parts)
        jobs: list[int] = []
        while pending and len(jobs) < size and pending[0] // count == place and pending[0] not in self._alone:
            jobs.append(pending.popleft())
        return jobs

    def _is_together(self, place: int) -> bool:
        """Whether a worker scores its responses concurrently (batch or async) instead of one after another."""
        return self._bindings[place].is_batch or self._functions[place]["is_async"]

    def _advance(self, outcomes: dict[int, _Outcome], pending: deque[int]) -> None:
        """Wait for the next message or deadline and process it."""
        waiting = {worker.connection: worker for worker in self._workers if not worker.idle}
        due = min(worker.due for worker in waiting.values())
        for connection in wait(list(waiting), max(due - time.monotonic(), 0.0)):
            self._read(waiting.pop(connection), outcomes, pending)
        for worker in waiting.values():
            # A message that has arrived was in time, even if it is read late.
            if worker.due <= time.monotonic() and not worker.connection.poll():
                if worker.starting:
                    raise RewardError(f"{self._key}: no worker loaded {self._names()} within {START_S:.0f} s")
                if not (worker.is_stopped() and self._requeue(worker, pending)):
                    self._lose(worker, outcomes, pending, _Outcome(seconds=worker.deadline_s, timed_out=True))

    def _read(self, worker: WorkerProcess, outcomes: dict[int, _Outcome], pending: deque[int]) -> None:
        try:
            message = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            code = worker.reap()
            if worker.starting and self._failed_starts >= self._allowed_failed_starts:
                raise RewardError(
                    f"{self._key}: a worker exited (code {code}) while importing {self._names()}"
                ) from None
            if worker.starting:
                self._failed_starts += 1
                self._replace([worker])
                return
            if code == -SIGKILL and self._requeue(worker, pending):
                return
            seconds = time.monotonic() - worker.due + worker.deadline_s
            alarmed = code == -SIGALRM
            self._lose(worker, outcomes, pending, _Outcome(seconds=seconds, timed_out=alarmed, died=not alarmed))
            return
        if "refused" in message:
            raise RewardError(f"{self._key}: {message['function']} cannot be used: {message['refused']}")
        if "ready" in message:
            worker.starting, self._failed_starts = False, 0
            self._functions = self._functions or message["ready"]
            return
        job = message.pop("item")
        if job not in worker.jobs:
            logger.warning("%s: dropped an unexpected result (item %d)", self._key, job)
            return
        worker.jobs.remove(job)
        outcomes[job] = _Outcome(**message)
        worker.due = time.monotonic() + worker.deadline_s

    def _lose(
        self, worker: WorkerProcess, outcomes: dict[int, _Outcome], pending: deque[int], outcome: _Outcome
    ) -> None:
        """Record the outcome of a job that killed its worker, requeue the other jobs, and start a new worker.

        If several responses were scored together, the cause is unknown: each is scored again, alone.
        """
        if len(worker.jobs) > 1 and worker.together:
            self._alone.update(worker.jobs)
        else:
            outcomes[worker.jobs.popleft()] = outcome
        pending.extendleft(reversed(worker.jobs))
        self._replace([worker])

    def _requeue(self, worker: WorkerProcess, pending: deque[int]) -> bool:
        """Requeue the jobs of a worker that was killed or stopped from outside, for example by the OOM killer.

        Returns:
            Whether the jobs were requeued: only once per job, as the job itself may be the cause.
        """
        present = list(worker.jobs) if worker.together else [worker.jobs[0]]
        if self._requeued.intersection(present):
            return False
        self._requeued.update(present)
        pending.extendleft(reversed(worker.jobs))
        self._replace([worker])
        return True

    def _replace(self, workers: list[WorkerProcess]) -> None:
        for worker in workers:
            worker.kill()
            self._workers[self._workers.index(worker)] = WorkerProcess(self._setup())

    def _names(self) -> str:
        return ", ".join(spec.function for spec in self.specs)

    def _raise_errors(self, place: int, samples: Sequence[Sample], outcomes: list[_Outcome]) -> None:
        failed = [index for index, outcome in enumerate(outcomes) if outcome.error]
        if failed:
            sample = samples[failed[0]]
            raise RewardError(
                f"{self._key}: {self.specs[place].function} failed for {len(failed)} of {len(samples)} responses, "
                f"first for item {failed[0]} (answer {sample.answer!r:.80}, response ends {sample.response[-80:]!r}): "
                f"{outcomes[failed[0]].error}"
            )


@dataclass(frozen=True)
class _Outcome:
    """Outcome of one job."""

    seconds: float
    reward: float = FAILED_REWARD
    correct: bool | None = False
    form: str | None = None
    timed_out: bool = False
    died: bool = False
    error: str = ""
