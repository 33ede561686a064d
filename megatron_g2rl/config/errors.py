"""The exception for invalid configurations."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_g2rl.errors import UserError


class ConfigError(UserError):
    """The configuration cannot be used; the message names every problem, its key and the fix."""

    @classmethod
    def listing(cls, title: str, problems: Sequence[str]) -> ConfigError:
        """An error with `title` on the first line and then one problem per line."""
        return cls("\n".join([f"{title}:", *(f"  - {problem}" for problem in problems)]))

    @property
    def problems(self) -> list[str]:
        """The individual problems of an error made by `listing`; of any other error, its message."""
        first, *listed = str(self).split("\n  - ")
        return listed or [first]
