"""Stops generation on all ranks when one of them is asked to stop or has failed.

Replicas run independently of each other: they set a key in the store of the process group, which the others poll once a
second. Ranks that share an engine run in lockstep, each with its own copy of the engine's scheduler, and must stop at
the same engine step: they agree by a small collective every few steps.
"""

from __future__ import annotations

import itertools
import time

import torch
import torch.distributed as dist

from megatron_g2rl.records import ResponseGroup
from megatron_g2rl.rollout.engine import OnGroup, Stop

AGREE_EVERY = 8
"""Engine steps between two agreement collectives of the ranks that share an engine."""
POLL_EVERY_S = 1.0
"""Seconds between two reads of the store."""
_CALLS = itertools.count()
"""Counts the calls of `generate`; every rank makes the same calls, so a number identifies the call on all ranks."""


class Watch:
    """The `stop` callable that a rank passes to its engine for one call of `generate`."""

    def __init__(self, stop: Stop | None, partners: dist.ProcessGroup | None) -> None:
        """Start watching; every rank does so for each call.

        Args:
            stop: returns whether this rank was asked to stop.
            partners: the ranks that share this rank's engine; None if it does not share one.
        """
        self._stop, self._partners = stop, partners
        self._store = dist.PrefixStore("rollout_stop", dist.distributed_c10d._get_default_store())
        self._key = str(next(_CALLS))
        self._ending = False
        self._error: Exception | None = None
        self._steps = 0
        self._last_poll = time.monotonic()

    def __call__(self) -> bool:
        """Whether to stop now; partners must call this equally often."""
        if self._partners is None:
            return self._should_stop()
        self._steps += 1
        if self._steps % AGREE_EVERY:
            return False
        flag = torch.tensor(float(self._should_stop()))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._partners)
        self._ending = bool(flag)
        return self._ending

    def request_stop(self) -> None:
        """Stop generation on all ranks."""
        self._store.set(self._key, "1")

    def wait_for_others(self) -> None:
        """Wait until every rank has generated its part; every rank calls this, also after a failure.

        Not a collective: one replica may take longer than another by more than a collective's timeout. A rank that
        hangs ends the run by its heartbeat; if a rank has exited, its launcher asks this one to stop.
        """
        if self._store.add(f"{self._key} arrived", 1) == dist.get_world_size():
            self._store.set(f"{self._key} complete", "1")
        pause = 0.001
        while not self._store.check([f"{self._key} complete"]) and not self._should_stop():
            time.sleep(pause)
            pause = min(1.2 * pause, POLL_EVERY_S / 5)

    def guarded(self, on_group: OnGroup) -> OnGroup:
        """Wrap `on_group` to keep its error for `raise_error`: raised directly, it would leave partners waiting."""

        def guard(group: ResponseGroup) -> None:
            if self._error is None:
                try:
                    on_group(group)
                except Exception as error:
                    self._error = error

        return guard

    def raise_error(self) -> None:
        """Raise the error of a guarded call, if any."""
        if self._error:
            raise self._error

    def _should_stop(self) -> bool:
        if self._ending:
            return True
        if self._error or (self._stop and self._stop()):
            self._ending = True
            self.request_stop()
        elif time.monotonic() - self._last_poll > POLL_EVERY_S:
            self._last_poll = time.monotonic()
            self._ending = self._store.check([self._key])
        return self._ending
