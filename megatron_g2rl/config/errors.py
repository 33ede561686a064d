"""The one exception of the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_g2rl.errors import UserError


class ConfigError(UserError):
    """The configuration cannot be used; the message names every problem found, its key and what to do."""

    @classmethod
    def listing(cls, title: str, problems: Sequence[str]) -> ConfigError:
        """An error that says `title` and then one problem a line."""
        return cls("\n".join([f"{title}:", *(f"  - {problem}" for problem in problems)]))
