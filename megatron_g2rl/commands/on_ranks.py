"""Runs the work of a command on all ranks: in this process if it is a rank, else in new processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_g2rl.config.world import launched_world_size
from megatron_g2rl.distributed.rank_reports import mark_failed, write_exit_code
from megatron_g2rl.distributed.ranks import become_rank, run_ranks
from megatron_g2rl.errors import UserError


def run_on_ranks(
    work: Callable[[], int], ranks: int, arguments: Sequence[str], device: str, output: Path | None = None
) -> int:
    """Do the work if this process is a rank, otherwise start the ranks; returns the exit code.

    Args:
        work: the work of a rank; returns its exit code. It imports torch, so that this is done on ranks only.
        ranks: processes to start outside a launcher such as torchrun or srun; with 1, this process does the work.
        arguments: of `g2rl`, for the ranks.
        device: `policy.device`.
        output: folder that the work writes.
    """
    if launched_world_size() is None and ranks > 1:
        return run_ranks(ranks, "megatron_g2rl.cli", list(arguments))
    become_rank(device, output)
    try:
        code = work()
    except SystemExit as stopped:  # by a signal, before there was anything to save (`end_on_signals`)
        code = stopped.code
    except UserError:
        raise
    except Exception:
        mark_failed()
        raise
    write_exit_code(code)
    return code
