"""The environment variables of every rank: NCCL, Megatron and PyTorch settings of a launch, each with its reason.

A profile's `environment:` overrides these. What depends on a site's network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA,
GLOO_SOCKET_IFNAME) has no default that is right everywhere: set it in the profile.
"""

from __future__ import annotations

from pathlib import PurePath

COMMON = {
    # Output of a rank appears immediately, not when a buffer is full.
    "PYTHONUNBUFFERED": "1",
    # Ranks share a node's cores; if each uses all of them, all run many times slower.
    "OMP_NUM_THREADS": "1",
    # Forked tokenizer threads warn, and can hang.
    "TOKENIZERS_PARALLELISM": "false",
    # torchrun kills ranks 30 s after a signal by default; a large model needs longer to save.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
}

GPU = {
    # Megatron overlaps tensor-parallel communication with computation only with one queue per device.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # PyTorch ends a rank whose collective times out; this also logs where each rank was.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    # NVLink SHARP takes GPU memory from every communicator, and Megatron has many.
    "NCCL_NVLS_ENABLE": "0",
    # Log network errors only.
    "NCCL_DEBUG": "WARN",
}
# Deliberately not set: TORCH_NCCL_ASYNC_ERROR_HANDLING (PyTorch's default ends the process without aborting the
# communicator first, which can hang) and TORCH_NCCL_AVOID_RECORD_STREAMS (default since PyTorch 2.8, which warns).

CPU = {
    # Megatron imports Dynamo, which takes 30 s instead of 5 s.
    "TORCHDYNAMO_DISABLE": "1",
    # vLLM would bind all ranks of a node to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def environment_of(device: str, launch_folder: PurePath) -> dict[str, str]:
    """Variables of every rank by name, with literal values; a profile's `environment` overrides them.

    Args:
        device: `policy.device` of the run.
        launch_folder: folder for a rank's last collectives after one has timed out.
    """
    # The old name, which newer versions of PyTorch also read; each rank appends its number.
    trace = {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{launch_folder}/nccl_trace_rank_"}
    return COMMON | (CPU if device == "cpu" else GPU | trace)
