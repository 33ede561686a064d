"""Ties a process to the one that started it, whatever ends that one (Linux; elsewhere nothing happens)."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_prctl = getattr(ctypes.CDLL(None), "prctl", None)


def signal_when_parent_ends(parent: int, number: signal.Signals) -> None:
    """Let the kernel send this process a signal when its parent ends, also by SIGKILL.

    Args:
        parent: process id of the parent, read by the parent or when this process began: if it has ended since, the
            signal is sent now.
        number: the signal.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Let descendants that lose their parent become this process's children, so that it can find and end them."""
    if _prctl is not None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
