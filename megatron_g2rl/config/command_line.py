"""What all commands of `g2rl` have in common: exit codes, `KEY=VALUE` arguments, examples in help texts, errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.keys import keys_of
from megatron_g2rl.config.sections.base import Section
from megatron_g2rl.config.tree import Config
from megatron_g2rl.errors import UserError

CONFIGURATION_ERROR = 2
"""Exit code for an invalid configuration, the same as for an invalid command line."""
RUN_ERROR = 1
"""Exit code of a run or a command that fails."""


def help_examples(*lines: str) -> str:
    """The examples at the end of a help text; the blank lines keep typer from joining them."""
    return "\n\n".join(["Examples:", *(f"  {line}" for line in lines)])


def override_argument(help_text: str, model: type[Section] = Config) -> Any:
    """The `KEY=VALUE` arguments of a command, with tab completion of the keys of `model`."""

    def complete(incomplete: str) -> list[str]:
        return [f"{path}=" for path in keys_of(model) if path.startswith(incomplete)]

    return typer.Argument(metavar="KEY=VALUE", help=help_text, autocompletion=complete)


@contextmanager
def user_errors(code: int | None = None) -> Iterator[None]:
    """Print a user-facing error as one message and exit.

    Args:
        code: exit code; None: that of the kind of error.
    """
    try:
        yield
    except UserError as error:
        typer.echo(error, err=True)
        of_kind = CONFIGURATION_ERROR if isinstance(error, ConfigError) else RUN_ERROR
        raise typer.Exit(of_kind if code is None else code) from None
