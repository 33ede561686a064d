"""Checks the annotated shapes and dtypes of the package at every call in the tests (jaxtyping with beartype).

The names of the dimensions are in megatron_g2rl/records.py: equal names in one call have equal sizes.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
from beartype import BeartypeConf, beartype

CHECKED = (
    "algorithm",
    "exploration",
    "policy.head",
    "policy.packing",
    "records",
    "tracking.metrics",
    "training.collection",
)
"""Modules and packages of megatron_g2rl whose calls are checked."""

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""An int is accepted where a float is expected (PEP 484)."""


def install() -> None:
    """Check the calls of `CHECKED` in modules that are imported from now on."""
    # policy/head runs with torch alone: it imports these names for type checkers only.
    for name in ("Bool", "Float", "Int"):
        setattr(builtins, name, getattr(jaxtyping, name))
    jaxtyping.install_import_hook([f"megatron_g2rl.{name}" for name in CHECKED], f"{__name__}.typecheck")


@contextmanager
def disabled() -> Iterator[None]:
    """No checks inside this context: wrong shapes reach the code, which refuses them itself."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
