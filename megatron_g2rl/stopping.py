"""Stops a run on request: SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 ask for a save at the next safe point."""

from __future__ import annotations

import logging
import signal

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

STOPPED = 75
"""Exit code of a run that was asked to stop and can be resumed (EX_TEMPFAIL: try again later)."""


class StopRequest:
    """Whether some rank was asked to stop. The first signal asks; a second Ctrl-C interrupts at once."""

    def __init__(self, device: torch.device):
        self.device, self.asked = device, False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
        log.warning("%s: saving and stopping at the next safe point", signal.Signals(number).name)

    def agreed(self) -> bool:
        """Whether any rank was asked; a collective, so that all ranks stop at the same point."""
        flag = torch.tensor(float(self.asked), device=self.device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
