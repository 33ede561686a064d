"""The verdict of a response to a built-in task, and the text in its box."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ONLY_BOX = re.compile(r"\s*\\boxed\{([^{}]*)\}\s*")


@dataclass(frozen=True)
class Verdict:
    """How good a response is."""

    credit: float
    """Partial credit from 0 to 1; 1: the response is correct."""
    form: str | None = None
    """Canonical form of a correct response: equal for solutions that are essentially the same."""
    has_forms: bool = True
    """False for a task whose problems have one solution each."""

    @property
    def is_correct(self) -> bool:
        """Whether the response is correct."""
        return self.credit == 1.0


def boxed_only(response: str) -> str | None:
    """The content of a response that is one box and nothing else; None for other responses."""
    match = _ONLY_BOX.fullmatch(response)
    return match[1] if match else None
