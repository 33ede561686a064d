"""Detects a GPU that is present but unusable, which would otherwise look like a machine without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_g2rl.config.install_hints import INSTALL

GPU_FILES = (Path("/dev/nvidia0"), Path("/proc/driver/nvidia/gpus"))
"""Paths that exist on a machine with an NVIDIA GPU and a loaded driver."""


def unusable_gpu(files: tuple[Path, ...] = GPU_FILES) -> str | None:
    """Why torch cannot use this machine's NVIDIA GPU; None: it can, there is no GPU, or the GPU is hidden on purpose.

    Args:
        files: paths, any of which shows that a GPU is present.
    """
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or torch.cuda.is_available() or not any(file.exists() for file in files):
        return None
    if torch.version.cuda is None:
        return f"this torch is a CPU-only build: install the CUDA build ({INSTALL})"
    try:
        torch.cuda.init()
    except Exception as error:  # a broken driver can raise anything; its message is the reason
        return f"torch {torch.__version__} cannot start CUDA: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return f"torch {torch.__version__} finds no device: compare the driver with CUDA {torch.version.cuda}"
