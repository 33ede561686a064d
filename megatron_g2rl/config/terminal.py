"""Where commands print tables."""

from __future__ import annotations

import sys

from rich.console import Console

LOG_COLUMNS = 140
"""Width of a table in a log, unless the command names another one."""


def table_console(columns: int = LOG_COLUMNS) -> Console:
    """A console as wide as the terminal; `columns` wide where the output is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else columns)
