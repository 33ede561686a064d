"""torchrun with its own logging off: each rank reports its failure; this wrapper reports only ranks killed by a signal.

python -m megatron_g2rl.distributed.torchrun --standalone --nproc-per-node=2 -m megatron_g2rl.cli train ...
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_g2rl.config.run_files import STOPPED
from megatron_g2rl.distributed.orphans import signal_when_parent_ends
from megatron_g2rl.distributed.rank_reports import discard_exit_code, read_exit_code, read_silent_rank
from megatron_g2rl.distributed.ranks import LAUNCHER

log = logging.getLogger(__name__)


def main() -> int:
    """Run torchrun's command line and return its exit code; report a rank that was killed and could not report it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # The ranks save and stop when the command that started them is killed: nothing else would end them.
    signal_when_parent_ends(int(os.environ.get(LAUNCHER, os.getppid())), signal.SIGTERM)
    os.environ[LAUNCHER] = str(os.getpid())
    from torch.distributed import run
    from torch.distributed.elastic.agent.server import api as agent
    from torch.distributed.elastic.multiprocessing import api

    # They warn of every signal that they forward and report every rank that did not exit with 0.
    for module in (agent, api):
        module.logger.setLevel(logging.CRITICAL)
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 or (failure.exitcode != STOPPED and read_exit_code() == STOPPED):
            discard_exit_code()  # rank 0 saved because torchrun ended it, not because the run was asked to stop
        if failure.exitcode < 0 and rank != read_silent_rank():
            name = signal.Signals(-failure.exitcode).name
            memory = ": the machine ran out of memory, or another process killed it" if name == "SIGKILL" else ""
            log.error("rank %d was ended by %s%s", rank, name, memory)
        return 1
    except api.SignalException as stopped:
        return 128 + stopped.sigval  # forwarded; the ranks have reported the outcome
    return 0


if __name__ == "__main__":
    sys.exit(main())
