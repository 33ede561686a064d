"""Hides GPU packages that cannot be used on this machine from Megatron: Transformer Engine, apex and flash-attn.

megatron-core imports them if they are installed, and handles only an ImportError. A package whose extension is missing
or was built for another torch raises another exception, and a working package without a GPU provides optimizer kernels
that need one. Both would end a run that needs none of these packages.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence

import torch

log = logging.getLogger(__name__)

PACKAGES = {"transformer_engine": "transformer_engine.pytorch", "apex": "apex", "flash_attn": "flash_attn"}
"""Package -> module that is imported to check whether the package works."""
NEEDS_GPU = "it needs a GPU, and torch finds none"
_reasons: dict[str, str] = {}
DETERMINISM = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
"""Environment variable of Transformer Engine: `0` allows only algorithms that give the same bits twice."""


def hide_unusable(packages: Sequence[str] = tuple(PACKAGES), *, cuda: bool | None = None) -> None:
    """Make packages that cannot be used on this machine unimportable in this process, and warn about broken ones.

    A package that is already imported is left alone.

    Args:
        packages: keys of `PACKAGES`; those that are not installed are skipped.
        cuda: whether a GPU is available; None: ask torch.
    """
    cuda = torch.cuda.is_available() if cuda is None else cuda
    for package in packages:
        if package in sys.modules or importlib.util.find_spec(package) is None:
            continue
        if not cuda:
            _hide(package, NEEDS_GPU)
        elif reason := broken(package):
            _hide(package, reason)
            if os.environ.get("RANK", "0") == "0":
                log.warning("%s is installed but broken, and is not used: %s", package, reason)


def broken(package: str) -> str | None:
    """Why an installed package cannot be imported; None: it can."""
    try:
        importlib.import_module(PACKAGES[package])
    except Exception as error:  # an OSError for a missing library, a RuntimeError for another torch, and others
        return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    return None


def _hide(package: str, reason: str) -> None:
    _reasons[package] = reason
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]
    sys.modules[package] = None  # importing it raises ImportError


def why_not(package: str = "transformer_engine") -> str | None:
    """Why an installed package is hidden; None: it is used, or not installed."""
    return _reasons.get(package)


def warn_without_deterministic_attention() -> None:
    """Warn on rank 0 if `DETERMINISM` is set but flash-attn, which long sequences then need, is not installed.

    Transformer Engine then chooses its unfused attention, whose memory is quadratic in the length, and in a
    context-parallel run none at all: the run fails at its first large micro-batch.
    """
    if os.environ.get(DETERMINISM, "1") != "0" or os.environ.get("RANK", "0") != "0":
        return
    if importlib.util.find_spec("flash_attn") is None:
        log.warning(
            "%s=0, but flash-attn is not installed: on GPUs before Hopper, and on Hopper if sequences x heads x "
            "length^2 of a micro-batch reach 2^30, attention needs memory quadratic in the length, and fails under "
            "context parallelism. Install flash-attn, set policy.layer_spec=torch, or remove the variable",
            DETERMINISM,
        )
