"""Starts and stops torch.distributed and Megatron's process groups, and gives this rank's position in the layout."""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import random
import resource
from dataclasses import dataclass
from datetime import timedelta

import numpy
import torch
import torch.distributed as dist

from megatron_g2rl.config.sections.model import PolicyConfig
from megatron_g2rl.device import unusable_gpu
from megatron_g2rl.distributed import rendezvous
from megatron_g2rl.distributed.environment import seconds_variable
from megatron_g2rl.errors import UserError
from megatron_g2rl.policy import megatron_compat

log = logging.getLogger(__name__)

TIMEOUT_VARIABLE = "G2RL_COLLECTIVE_SECONDS"
"""Environment variable: timeout in seconds of a step's collectives: those on a device or in Megatron's groups."""
DEFAULT_S = 600.0
"""Ranks take equally long in a step; a rank that is ten minutes late has diverged from the others, or hangs."""
WORK_TIMEOUT = timedelta(days=1)
"""Timeout of object collectives and barriers of all ranks (over gloo), in which ranks wait for work that one of them
does alone, such as a download or writing a large file. A rank that is lost meanwhile ends the run immediately, a
silent rank ends it through its heartbeat."""

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Backend of the world group, by device type: object collectives and barriers of all ranks use gloo."""
GROUP_BACKENDS = {"cpu": None, "cuda": "nccl"}
"""Backend of Megatron's groups. With gloo in addition to NCCL, each group would immediately open a connection to every
member: thousands per rank in a run of 512. Their tensors are on the device; the few objects are sent through it too."""


@dataclass(frozen=True)
class Runtime:
    """Device, rank and position of this process in the parallel layout."""

    device: torch.device
    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int

    @property
    def last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def reports(self) -> bool:
        """Whether this rank contributes its results: it is on the last stage and the first tensor-parallel rank."""
        return self.last_stage and self.tensor_rank == 0


def pick_device(name: str) -> torch.device:
    """The device of this rank for `policy.device`.

    Raises:
        UserError: `cuda` is requested and not available, or `cpu` is requested where megatron would use CUDA.
    """
    if name == "cpu" and torch.cuda.is_available():
        raise UserError(
            "policy.device=cpu, but CUDA devices are visible and megatron would use them: start with "
            "CUDA_VISIBLE_DEVICES= (the g2rl command sets it automatically)"
        )
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("policy.device=cuda, but this machine has no CUDA device; set policy.device=cpu or auto")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def start(policy: PolicyConfig, seed: int, identity: str = "") -> Runtime:
    """Join the process group (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and create Megatron's groups.

    Args:
        policy: layout and device.
        seed: seed of megatron's random-number tracker, which derives a different one for each model-parallel rank.
        identity: identifies the run; ranks of other runs are not accepted.

    Raises:
        UserError: the device is not available, the rendezvous fails, or an environment variable is not a valid time.
    """
    device = join(policy.device, identity)
    from megatron.core import parallel_state, tensor_parallel

    make_groups(policy, GROUP_BACKENDS[device.type])
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Runtime(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel_state.get_context_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def join(device_name: str, identity: str = "") -> torch.device:
    """Join the process group, without Megatron's groups; returns this rank's device.

    Args:
        device_name: `policy.device`.
        identity: as for `start`.

    Raises:
        UserError: as `start`.
    """
    step_timeout()  # report an invalid value before ranks wait for each other
    device = pick_device(device_name)
    if device_name == "auto" and os.environ.get("RANK", "0") == "0" and (reason := unusable_gpu()):
        log.warning("policy.device=auto: running on the CPU, although this machine has an NVIDIA GPU: %s", reason)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    raise_open_file_limit()
    if not dist.is_initialized():
        _join(BACKENDS[device.type], identity)
    return device


def make_groups(policy: PolicyConfig, backend: str | None) -> None:
    """Create Megatron's process groups in the initialized world of torch.distributed.

    Args:
        policy: layout.
        backend: backend of the groups; None: that of the world.
    """
    from megatron.core import parallel_state

    with megatron_compat.groups_on(backend):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=policy.tensor_parallel,
            pipeline_model_parallel_size=policy.pipeline_parallel,
            virtual_pipeline_model_parallel_size=policy.virtual_stages if policy.virtual_stages > 1 else None,
            context_parallel_size=policy.context_parallel,
            expert_model_parallel_size=policy.expert_parallel,
            expert_tensor_parallel_size=1 if policy.expert_parallel > 1 else None,
            distributed_timeout_minutes=step_timeout().total_seconds() / 60,
            create_gloo_process_groups=False,  # only needed for Megatron's own checkpoint saving
        )


def step_timeout() -> timedelta:
    """Timeout of a step's collectives.

    Raises:
        UserError: the environment variable is not a number of seconds above 0.
    """
    longest = WORK_TIMEOUT.total_seconds()
    return timedelta(seconds=seconds_variable(TIMEOUT_VARIABLE, DEFAULT_S, longest, "a day at most"))


def raise_open_file_limit() -> None:
    """Raise this process's limit of open files to the maximum: each gloo connection and each shard needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning(
                "the limit of open files remains %d (%s); with hundreds of ranks, raise it with ulimit -n", soft, error
            )


def reseed(seed: int, step: int) -> None:
    """Seed every random state of this process as a function of the run's seed and the step.

    No random state has to be saved: a resumed step samples the same values under any layout.
    """
    from megatron.core import tensor_parallel

    mixed = int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=4).digest(), "little") >> 1
    random.seed(mixed)
    numpy.random.seed(mixed)
    torch.default_generator.manual_seed(mixed)
    tensor_parallel.model_parallel_cuda_manual_seed(mixed)


def _join(backend: str, identity: str) -> None:
    store = rendezvous.meet(identity)
    limit = step_timeout()
    store.set_timeout(limit)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    # The gloo backend: on a CPU it serves all collectives, with NCCL only object collectives and barriers.
    dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(WORK_TIMEOUT)
    if "nccl" not in backend:
        # Threads of gloo and of the store that outlive the interpreter sometimes abort the process.
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def stop() -> None:
    """Leave all process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
