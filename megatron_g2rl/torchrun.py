"""torchrun, quiet: ranks say themselves what went wrong; only of one that was killed there is a line from here.

python -m megatron_g2rl.torchrun --standalone --nproc-per-node=2 -m megatron_g2rl.cli train ...
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Run torchrun's command line; its exit code. A rank that was killed could say nothing: that is said here."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    _stop_with(os.getppid())
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import api

    # It warns of every signal it passes on and reports every rank that did not end with 0.
    api.logger.setLevel(logging.CRITICAL)
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            memory = ": the machine ran out of memory, or somebody killed it" if name == "SIGKILL" else ""
            log.error("rank %d was ended by %s%s", rank, name, memory)
        return 1
    except api.SignalException as stopped:
        return 128 + stopped.sigval  # passed on; the ranks have said what they made of it
    return 0


def _stop_with(parent: int) -> None:
    """Let the ranks save and stop when the command that started them is killed: nobody else would end them."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)  # it died before the line above


if __name__ == "__main__":
    sys.exit(main())
