"""Finds a GPU that is there and cannot be used, which would otherwise look like a machine without one."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_g2rl.config.install_hints import INSTALL

GPU_FILES = (Path("/dev/nvidia0"), Path("/proc/driver/nvidia/gpus"))
"""What a machine with an NVIDIA GPU and a loaded driver has."""


def unusable_gpu(files: tuple[Path, ...] = GPU_FILES) -> str | None:
    """Why torch cannot use the NVIDIA GPU of this machine; None: it can, there is none, or it is hidden on purpose.

    Args:
        files: of which one is there where a GPU is.
    """
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or torch.cuda.is_available() or not any(file.exists() for file in files):
        return None
    if torch.version.cuda is None:
        return f"this torch is built for a CPU: install the CUDA build ({INSTALL})"
    try:
        torch.cuda.init()
    except Exception as error:  # a driver can be broken in any way; its message is the answer
        return f"torch {torch.__version__} cannot start CUDA: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return f"torch {torch.__version__} finds no device: compare the driver with CUDA {torch.version.cuda}"
