"""Counts what is wrong with rows and shows the first few, however many there are."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from megatron_g2rl.config.tree import DataConfig
from megatron_g2rl.data.errors import DataError

logger = logging.getLogger(__name__)

SHOWN_ROWS = 5
"""Rows that a message lists; the rest is counted."""


@dataclass
class Faults:
    """Rows of one kind of fault."""

    count: int = 0
    shown: list[str] = field(default_factory=list)
    """`file.jsonl:12: what is wrong` of the first few."""

    def add(self, where: str, fault: str) -> None:
        """Count a row."""
        self.count += 1
        if len(self.shown) < SHOWN_ROWS:
            self.shown.append(f"{where}: {fault}")

    def listing(self) -> str:
        """The first few, each on a line, and how many more there are."""
        more = f"\n  and {self.count - len(self.shown)} more" if self.count > len(self.shown) else ""
        return "\n  ".join(self.shown) + more


@dataclass
class RowReport:
    """What reading the rows of a source has found."""

    total: int = 0
    """Rows of the source, bad ones too."""
    distinct: int = 0
    """Different problems among the good rows."""
    bad: Faults = field(default_factory=Faults)
    prose: Faults = field(default_factory=Faults)
    """Good rows whose reference is no final answer."""
    longest: tuple[int, str] = (0, "")
    """Tokens and place of the longest row over the limit; 0: none is."""

    def listing(self) -> str:
        """The first few bad rows, and the longest row if one is too long."""
        listed = self.bad.listing()
        if self.longest[0]:
            listed += f"\n  the longest row is {self.longest[1]} with {self.longest[0]} tokens"
        return listed

    def check(self, config: DataConfig) -> None:
        """Stop when rows are bad and must not be, or when none is left; else log what was left out.

        Raises:
            DataError: the first few bad rows, their number, and the longest row if one is too long.
        """
        if self.total == 0:
            raise DataError(f"data.source: {config.label} has no rows")
        if not self.bad.count:
            return
        listed = self.listing()
        found = f"{self.bad.count} of {self.total} rows of {config.label} are bad"
        if config.on_bad_row == "error":
            raise DataError(f"{found}; correct them, or set data.on_bad_row=skip to leave them out:\n  {listed}")
        if self.bad.count == self.total:
            raise DataError(f"{found}: no prompt is left:\n  {listed}")
        logger.warning("%s and left out:\n  %s", found, listed)
