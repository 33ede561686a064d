"""Stops a run on request: a signal (SIGTERM, SIGINT, SIGHUP, SIGUSR1) or the end of `trainer.stop_after`."""

from __future__ import annotations

import logging
import re
import signal
import time

import psutil
import torch
import torch.distributed as dist

from megatron_g2rl.config.command_line import RUN_ERROR
from megatron_g2rl.config.run_files import STOPPED
from megatron_g2rl.config.world import launched_rank
from megatron_g2rl.distributed.rank_reports import a_rank_has_reported, read_exit_code

log = logging.getLogger(__name__)

_UNITS_S = {"d": 86_400, "h": 3600, "m": 60, "s": 1}


def seconds_of(duration: str) -> float:
    """Convert a duration such as `3h50m` to seconds."""
    return float(sum(int(number) * _UNITS_S[unit] for number, unit in re.findall(r"(\d+)([dhms])", duration)))


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def end_on_signals() -> None:
    """End the process immediately on a signal: until a run trains (`StopRequest`), there is nothing to save.

    torchrun also ends a rank with SIGTERM because another rank failed: that rank has reported the cause.
    """

    def end(number: int, frame) -> None:
        if number == signal.SIGTERM and a_rank_has_reported():
            raise SystemExit(read_exit_code() or RUN_ERROR)
        if launched_rank() == "0":
            log.warning("%s: stopping; there is nothing to save yet", signal.Signals(number).name)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(STOPPED)

    for number in _SIGNALS:
        signal.signal(number, end)


class StopRequest:
    """Tracks requests to stop. The first signal requests a stop; a second Ctrl-C interrupts immediately."""

    def __init__(self, device: torch.device, stop_after: str | None = None):
        """Install the signal handlers, at the start of training.

        Args:
            device: device of the flag that the ranks reduce.
            stop_after: duration after which the run stops, counted from the start of this process.
        """
        self.device = device
        self.requested_at: float | None = None
        """When this rank received the request (time.time(), seconds); None without one."""
        self._stop_after = stop_after
        self._deadline = None
        if stop_after is not None:
            self._deadline = psutil.Process().create_time() + seconds_of(stop_after)
        for number in _SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame) -> None:
        if self.requested_at is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGTERM and a_rank_has_reported():  # torchrun ends this rank, because another one failed
            self.requested_at = self.requested_at or time.time()
        self._request(signal.Signals(number).name)

    def _request(self, reason: str) -> None:
        if self.requested_at is None:
            self.requested_at = time.time()
            level = logging.WARNING if launched_rank() == "0" else logging.INFO
            log.log(level, "%s: saving and stopping at the next safe point", reason)

    def requested_here(self) -> bool:
        """Whether this rank received a request or reached `trainer.stop_after`; not a collective."""
        if self.requested_at is None and self._deadline is not None and time.time() >= self._deadline:
            self._request(f"trainer.stop_after={self._stop_after} has elapsed")
        return self.requested_at is not None

    def requested_anywhere(self) -> bool:
        """Whether any rank is to stop; a collective, so that all ranks stop at the same point."""
        flag = torch.tensor(float(self.requested_here()), device=self.device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
