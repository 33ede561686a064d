"""The environment of every rank: the NCCL, Megatron and PyTorch settings of a launch, each with its reason.

A profile's `environment:` overrides these. What depends on a site's network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA,
GLOO_SOCKET_IFNAME) has no default that is right everywhere: set it in the profile.
"""

from __future__ import annotations

from pathlib import PurePath

COMMON = {
    # Lines of a rank appear when they are printed, not when a buffer is full.
    "PYTHONUNBUFFERED": "1",
    # Ranks share a node's cores; libraries that take all of them each run many times slower.
    "OMP_NUM_THREADS": "1",
    # Forked tokenizer threads warn, and can hang.
    "TOKENIZERS_PARALLELISM": "false",
    # torchrun kills ranks 30 s after a signal by default; a large model needs longer to save.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}

GPU = {
    # Megatron overlaps tensor-parallel communication with computation only with one queue per device.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # A collective that times out ends its rank (PyTorch does that by itself); this logs where each rank was.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    # NVLink SHARP takes GPU memory from every communicator, and Megatron has many.
    "NCCL_NVLS_ENABLE": "0",
    # Log network errors only.
    "NCCL_DEBUG": "WARN",
}
# Not set on purpose: TORCH_NCCL_ASYNC_ERROR_HANDLING (PyTorch's default ends the process without aborting the
# communicator first, which can hang) and TORCH_NCCL_AVOID_RECORD_STREAMS (the default since PyTorch 2.8, which warns).

CPU = {
    # Dynamo is imported by megatron: 30 s instead of 5 s.
    "TORCHDYNAMO_DISABLE": "1",
    # vLLM would bind all ranks of a node to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def environment_of(device: str, launch_folder: PurePath) -> dict[str, str]:
    """Variables of every rank by name, values literally; a profile's `environment` overrides them.

    Args:
        device: `policy.device` of the run.
        launch_folder: where a rank's last collectives are written when one has timed out.
    """
    # The old name, which newer versions of PyTorch read too; each rank appends its number.
    trace = {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{launch_folder}/nccl_trace_rank_"}
    return COMMON | (CPU if device == "cpu" else GPU | trace)
