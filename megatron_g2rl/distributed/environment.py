"""The environment variables of a rank: Megatron, NCCL, PyTorch and compiler caches, each with its reason.

`ranks.become_rank` sets them before torch is imported, whatever started the rank: `g2rl train`, torchrun, srun or a
launched job. A variable that is already set is kept: the shell, `environment` of a cluster profile and an image
take precedence. What depends on a site's network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA, GLOO_SOCKET_IFNAME) has no default
that is right everywhere. vLLM's own variables are in `rollout.vllm_compat`.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from megatron_g2rl.errors import UserError

log = logging.getLogger(__name__)

RANK = {
    # Output of a rank and of its processes appears immediately, not when a buffer is full.
    "PYTHONUNBUFFERED": "1",
}

SEVERAL_RANKS = {
    # Ranks share a node's cores: with more threads than cores, two ranks on two cores run 3-20x slower.
    "OMP_NUM_THREADS": "1",
    # Threads of tokenizers as well; forked ones also warn, and can hang.
    "TOKENIZERS_PARALLELISM": "false",
    # When rank 0 has ended, its store is lost to the other ranks, which report that themselves; PyTorch would add a
    # warning with 20 lines of C++ frames. Its errors, such as timeouts of collectives, are still logged.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

MEGATRON = {
    # Megatron overlaps tensor-parallel communication with computation only with one queue per device.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}

GPU = {
    # PyTorch ends a rank whose collective times out; this also logs where each rank was.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    # NVLink SHARP takes GPU memory from every communicator, and Megatron has many.
    "NCCL_NVLS_ENABLE": "0",
    # Log network errors only.
    "NCCL_DEBUG": "WARN",
}
# Deliberately not set: TORCH_NCCL_ASYNC_ERROR_HANDLING (PyTorch's default ends the process without aborting the
# communicator first, which can hang), TORCH_NCCL_AVOID_RECORD_STREAMS (default since PyTorch 2.8, which warns) and
# PYTORCH_CUDA_ALLOC_CONF (docs/dev/gpu.md).

CPU = {
    # Megatron binds torch.compile at import, which takes 30 s instead of 5 s, and compiling for a CPU takes minutes.
    "TORCHDYNAMO_DISABLE": "1",
}

COLLECTIVE_TRACES = "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
"""File of a rank's last collectives after a timeout, without the rank's number. The old name, which newer versions of
PyTorch also read."""

COMPILE_CACHES = {"VLLM_CACHE_ROOT": "vllm", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Environment variables of cache folders for compiled code, and the names of these folders."""


def seconds_variable(name: str, default: float, largest: float, limit: str) -> float:
    """The seconds that an environment variable sets.

    Args:
        name: name of the variable.
        default: seconds if it is not set.
        largest: upper limit in seconds.
        limit: the upper limit in words, for the message.

    Raises:
        UserError: its value is not a number above 0 within the limit.
    """
    text = os.environ.get(name, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= largest:
        raise UserError(f"{name}={text}: give a number of seconds above 0, {limit}")
    return seconds


def set_rank_variables(device: str, ranks: int, run_folder: Path | None = None) -> None:
    """Set the variables of this rank; those that are already set keep their values.

    Args:
        device: `policy.device`; with `cpu`, GPUs are hidden, because Megatron uses any that is visible.
        ranks: ranks of the run.
        run_folder: folder of the run, for collective traces; a launched run has its own folder for them.
    """
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    set_defaults(RANK)
    if ranks > 1:
        set_defaults(SEVERAL_RANKS)
    set_device_variables(device)
    traces = os.environ.get("G2RL_LAUNCH", run_folder)
    if device != "cpu" and traces is not None:
        set_defaults({COLLECTIVE_TRACES: f"{Path(traces).absolute()}/nccl_trace_rank_"})
    _keep_compile_caches_local()


def set_device_variables(device: str) -> None:
    """Set the variables of Megatron, NCCL and PyTorch for a device: `cpu`, `cuda`, or `auto` if it is not known yet."""
    set_defaults(MEGATRON | (CPU if device == "cpu" else GPU))


def set_defaults(variables: Mapping[str, str]) -> None:
    """Set environment variables that are not set."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _keep_compile_caches_local() -> None:
    """Cache compiled code on this machine (TMPDIR, else /tmp); by default all ranks would write to the home folder.

    A folder of that name owned by another user is not used, because code in it is executed.
    """
    folder = Path(tempfile.gettempdir()) / f"megatron_g2rl_{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
            raise PermissionError("other users may write to it")
    except OSError as error:
        log.warning("compiled code is cached in the home folder: %s cannot be used (%s)", folder, error)
        return
    set_defaults({variable: str(folder / name) for variable, name in COMPILE_CACHES.items()})
