"""The environment of every rank: the one place where NCCL, Megatron and PyTorch settings of a launch are made.

A profile's `environment:` wins over these. What depends on a site's network (NCCL_SOCKET_IFNAME, NCCL_IB_HCA,
GLOO_SOCKET_IFNAME) has no default that is right everywhere: it belongs into the profile.
"""

from __future__ import annotations

from megatron_g2rl.launch.profiles import Profile

COMMON = {
    # Lines of a rank appear when they are said, not when a buffer is full.
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
    # A rank that is gone makes the others fail after the timeout instead of waiting for ever.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    # NCCL's record streams keep memory from being reused; needed by large models.
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
    # NVLink SHARP takes GPU memory from every communicator, and Megatron has many.
    "NCCL_NVLS_ENABLE": "0",
    # What goes wrong in the network is said, not more.
    "NCCL_DEBUG": "WARN",
}

CPU = {
    # Dynamo is imported by megatron: 30 s instead of 5 s.
    "TORCHDYNAMO_DISABLE": "1",
    # vLLM would bind all ranks of a node to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def environment_of(profile: Profile, device: str) -> dict[str, str]:
    """Variables of every rank by name, values literally; secrets are not among them.

    Args:
        profile: of the site.
        device: `policy.device` of the run.
    """
    return {**COMMON, **(CPU if device == "cpu" else GPU), **profile.environment}
