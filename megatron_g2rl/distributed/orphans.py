"""Ties a process to its parent, however the parent ends (Linux only; a no-op elsewhere)."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_prctl = getattr(ctypes.CDLL(None), "prctl", None)


def signal_when_parent_ends(parent: int, number: signal.Signals) -> None:
    """Let the kernel send this process a signal when its parent ends, even by SIGKILL.

    Args:
        parent: process id of the parent, read by the parent or at the start of this process: if the parent has ended
            since, the signal is sent immediately.
        number: the signal.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Make orphaned descendants children of this process, so that it can find and end them."""
    if _prctl is not None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
