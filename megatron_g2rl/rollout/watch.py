"""Ends the sampling of all ranks when one of them is asked to stop, or has failed.

Replicas do not run in step with each other: they leave word in the store that the process group was made with, which
the others look into once a second. Ranks that share an engine do run in step, each with its own copy of the engine's
scheduler, and must leave at the same engine step: they agree by a small collective every few steps.
"""

from __future__ import annotations

import itertools
import time

import torch
import torch.distributed as dist

from megatron_g2rl.records import ResponseGroup
from megatron_g2rl.rollout.engine import OnGroup, Stop

AGREE_EVERY = 8
"""Engine steps between two agreements of the ranks that share an engine."""
LOOK_EVERY_S = 1.0
"""Seconds between two looks at what the other replicas say."""
_CALLS = itertools.count()
"""Numbers the calls of a process; every rank makes the same ones, so that a number means the same to all."""


class Watch:
    """Whether one call of `generate` is to end: the `stop` that a rank hands to its engine."""

    def __init__(self, stop: Stop | None, partners: dist.ProcessGroup | None) -> None:
        """Begin to watch; every rank does so for each call.

        Args:
            stop: whether this rank is asked to stop.
            partners: the ranks that share this rank's engine, None if it has one of its own.
        """
        self._stop, self._partners = stop, partners
        self._store = dist.PrefixStore("rollout_stop", dist.distributed_c10d._get_default_store())
        self._key = str(next(_CALLS))
        self._ending = False
        self._error: Exception | None = None
        self._steps = 0
        self._looked = time.monotonic()

    def __call__(self) -> bool:
        """Whether to end now; with partners, they must ask equally often."""
        if self._partners is None:
            return self._asked()
        self._steps += 1
        if self._steps % AGREE_EVERY:
            return False
        flag = torch.tensor(float(self._asked()))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._partners)
        self._ending = bool(flag)
        return self._ending

    def tell_others(self) -> None:
        """Let the sampling of all ranks end."""
        self._store.set(self._key, "1")

    def wait_for_others(self) -> None:
        """Wait until every rank has drawn its part; every rank calls it, also after a failure.

        Not in a collective: its timeout is shorter than the time that one replica may need more than another. A rank
        that no longer runs ends the run by its heartbeat; one that has ended makes its launcher ask this one to stop.
        """
        if self._store.add(f"{self._key} arrived", 1) == dist.get_world_size():
            self._store.set(f"{self._key} complete", "1")
        pause = 0.001
        while not self._store.check([f"{self._key} complete"]) and not self._asked():
            time.sleep(pause)
            pause = min(1.2 * pause, LOOK_EVERY_S / 5)

    def guarded(self, on_group: OnGroup) -> OnGroup:
        """`on_group`, with its failure kept for `raise_error`: raised here, it would leave partners waiting."""

        def guard(group: ResponseGroup) -> None:
            if self._error is None:
                try:
                    on_group(group)
                except Exception as error:
                    self._error = error

        return guard

    def raise_error(self) -> None:
        """Raise what a guarded call raised."""
        if self._error:
            raise self._error

    def _asked(self) -> bool:
        if self._ending:
            return True
        if self._error or (self._stop and self._stop()):
            self._ending = True
            self.tell_others()
        elif time.monotonic() - self._looked > LOOK_EVERY_S:
            self._looked = time.monotonic()
            self._ending = self._store.check([self._key])
        return self._ending
