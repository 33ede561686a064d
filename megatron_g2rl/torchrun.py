"""torchrun, quiet: ranks say themselves what went wrong; only of one that was killed there is a line from here.

    python -m megatron_g2rl.torchrun --standalone --nproc-per-node=2 -m megatron_g2rl.cli train ...
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

log = logging.getLogger(__name__)


def main() -> int:
    """Run torchrun's command line; its exit code. A rank that was killed could say nothing: that is said here."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
