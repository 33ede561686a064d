"""Starts and stops torch.distributed and Megatron's process groups, and says where this rank stands in the layout."""

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

from megatron_g2rl.config.tree import PolicyConfig
from megatron_g2rl.device import unusable_gpu
from megatron_g2rl.distributed import rendezvous
from megatron_g2rl.errors import UserError
from megatron_g2rl.policy import megatron_compat

log = logging.getLogger(__name__)

TIMEOUT_VARIABLE = "G2RL_COLLECTIVE_SECONDS"
"""Environment variable: how long a collective of a step may wait: on a device, or in one of Megatron's groups."""
DEFAULT_S = 600.0
"""What ranks do in a step takes them equally long; one that is ten minutes late has taken another path, or hangs."""
WORK_TIMEOUT = timedelta(days=1)
"""How long ranks wait for what one of them does alone, such as a download or a large file: in objects and barriers of
all ranks, over gloo. A rank that is lost in the meantime ends the run at once, one that is silent by its heartbeat."""

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""Of the world, by kind of device: objects and barriers of all ranks go over gloo."""
GROUP_BACKENDS = {"cpu": None, "cuda": "nccl"}
"""Of Megatron's groups. With gloo beside NCCL each would open a connection to every member at once: thousands a rank
in a run of 512. What travels in them lies on the device; the few objects go through it too."""


@dataclass(frozen=True)
class Runtime:
    """Where this process stands."""

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
        """Whether this rank speaks for its share of a result: last pipeline stage, first tensor-parallel rank."""
        return self.last_stage and self.tensor_rank == 0


def pick_device(name: str) -> torch.device:
    """The device of this rank for `policy.device`.

    Raises:
        UserError: `cuda` is asked for and there is none, or `cpu` where megatron would use CUDA.
    """
    if name == "cpu" and torch.cuda.is_available():
        raise UserError(
            "policy.device=cpu, but CUDA devices are visible and megatron would use them: start with "
            "CUDA_VISIBLE_DEVICES= (g2rl does so by itself)"
        )
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("policy.device=cuda, but this machine has no CUDA device; set policy.device=cpu or auto")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def start(policy: PolicyConfig, seed: int, identity: str = "") -> Runtime:
    """Join the process group (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and make Megatron's groups.

    Args:
        policy: layout and device.
        seed: seed of megatron's random-number tracker; different in each model-parallel rank by megatron's own rule.
        identity: names the run; ranks of another one are not met.

    Raises:
        UserError: the device is not there, the ranks do not find each other, or an environment variable is no time.
    """
    step_timeout()  # what is wrong with it is reported before ranks wait for each other
    device = pick_device(policy.device)
    if policy.device == "auto" and os.environ.get("RANK", "0") == "0" and (reason := unusable_gpu()):
        log.warning("policy.device=auto: training on the CPU, although this machine has an NVIDIA GPU: %s", reason)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    raise_open_file_limit()
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        _join(BACKENDS[device.type], identity)
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


def make_groups(policy: PolicyConfig, backend: str | None) -> None:
    """Make Megatron's process groups in the world that torch.distributed has joined.

    Args:
        policy: layout.
        backend: of the groups; None: that of the world.
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
            create_gloo_process_groups=False,  # Megatron's own checkpoints need them, ours do not
        )


def step_timeout() -> timedelta:
    """How long a collective of a step may wait.

    Raises:
        UserError: the environment variable is no number of seconds above 0.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= WORK_TIMEOUT.total_seconds():
        raise UserError(f"{TIMEOUT_VARIABLE}={text}: give a number of seconds above 0, a day at most")
    return timedelta(seconds=seconds)


def raise_open_file_limit() -> None:
    """Let this process open as many files as the system allows: every gloo connection is one, and so is every shard."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning("the limit of open files stays %d (%s); raise it for hundreds of ranks: ulimit -n", soft, error)


def reseed(seed: int, step: int) -> None:
    """Make every random state of this process a function of the run's seed and the step.

    Nothing random has to be saved then: a resumed step draws what it would have drawn, under any layout.
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
    # On a CPU this is the backend of the world; beside NCCL, that of objects and barriers.
    dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(WORK_TIMEOUT)
    if "nccl" not in backend:
        # Threads of gloo and of the store that outlive the interpreter end the process with an abort now and then.
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
