"""Where the documentation, the examples and the lists of exact versions are, so that messages can name them.

In a checkout they are files of the repository; setup.py copies them into the wheel, to `megatron_g2rl/shipped`.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL = _PACKAGE / "shipped"


def shipped(name: str) -> Path:
    """Path of a shipped file or folder such as `docs/install.md`: in the installed package, or in the checkout.

    Relative to the current folder when it is inside it, as in the top folder of a checkout.
    """
    path = (_IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent) / name
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
