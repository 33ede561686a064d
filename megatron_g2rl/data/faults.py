"""Counts invalid rows and lists the first few of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.data.errors import DataError

logger = logging.getLogger(__name__)

SHOWN_ROWS = 5
"""Maximum rows listed in a message; the others are only counted."""


@dataclass
class Faults:
    """Rows with one kind of fault."""

    count: int = 0
    shown: list[str] = field(default_factory=list)
    """`file.jsonl:12: reason` of the first few."""

    def add(self, where: str, fault: str) -> None:
        """Count a row."""
        self.count += 1
        if len(self.shown) < SHOWN_ROWS:
            self.shown.append(f"{where}: {fault}")

    def listing(self) -> str:
        """The first few, one per line, and the number of the others."""
        more = f"\n  and {self.count - len(self.shown)} more" if self.count > len(self.shown) else ""
        return "\n  ".join(self.shown) + more


@dataclass
class RowReport:
    """Statistics and faults of the rows of a source."""

    total: int = 0
    """Rows of the source, including bad ones."""
    distinct: int = 0
    """Distinct problems among the good rows."""
    bad: Faults = field(default_factory=Faults)
    prose: Faults = field(default_factory=Faults)
    """Good rows whose reference is not a final answer."""
    longest: tuple[int, str] = (0, "")
    """Tokens and location of the longest row over the limit; 0 if there is none."""

    def listing(self) -> str:
        """The first few bad rows, and the longest row if one is too long."""
        listed = self.bad.listing()
        if self.longest[0]:
            listed += f"\n  the longest row is {self.longest[1]} with {self.longest[0]} tokens"
        return listed

    def check(self, config: DataConfig) -> None:
        """Raise if bad rows are not allowed or no row is left; otherwise log the skipped rows.

        Raises:
            DataError: the first few bad rows, their number, and the longest row if one is too long.
        """
        if self.total == 0:
            raise DataError(f"data.source: {config.label} has no rows")
        if not self.bad.count:
            return
        listed = self.listing()
        summary = f"{self.bad.count} of {self.total} rows of {config.label} are bad"
        if config.on_bad_row == "error":
            raise DataError(f"{summary}; fix them, or set data.on_bad_row=skip to skip them:\n  {listed}")
        if self.bad.count == self.total:
            raise DataError(f"{summary}: no prompt is left:\n  {listed}")
        logger.warning("%s and were skipped:\n  %s", summary, listed)
