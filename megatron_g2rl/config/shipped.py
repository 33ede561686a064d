"""Paths of the documentation, the examples and the constraints files, for messages.

In a checkout they are files of the repository; setup.py copies them to `megatron_g2rl/shipped` in the wheel.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL = _PACKAGE / "shipped"


def shipped(name: str) -> Path:
    """Path of a shipped file or folder such as `docs/install.md`: in the installed package, or in the checkout.

    Relative to the working directory if it is inside it, as at the top of a checkout.
    """
    path = (_IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent) / name
    current = Path.cwd()
    return path.relative_to(current) if path.is_relative_to(current) else path
