"""Tables of answers and references, one pair per line."""

from __future__ import annotations


def pairs(table: str) -> list[tuple[str, str]]:
    """(reference, answer) of each line `REFERENCE <- ANSWER` of a table."""
    return [tuple(line.split(" <- ")) for line in table.strip("\n").split("\n")]
