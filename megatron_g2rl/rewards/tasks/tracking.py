"""Tracking: the states after each of a chain of operations, all of which must be right."""

from __future__ import annotations

import re

from megatron_g2rl.rewards.tasks.verdict import Verdict, boxed_only

MODULUS = 10
"""States are from 0 to one less than this value."""
_PROBLEM = re.compile(r"(\d):((?:[-+*]\d)+)")
_OPERATION = re.compile(r"([-+*])(\d)")


def verify(response: str, answer: str, problem: str) -> Verdict:
    """Verify the states after each operation, in a box with nothing before or after it: `\\boxed{2,6,8}`.

    The credit is the fraction of operations before the first incorrect state, relative to the longer of the response
    and the problem. The solution is unique, so there are no forms.

    Args:
        response: the response.
        answer: the correct states, not used.
        problem: such as `7:+5*3-8`; every result is modulo `MODULUS`.

    Raises:
        ValueError: `problem` has another format.
    """
    states = [str(state) for state in states_of(problem)]
    given = (boxed_only(response) or "").split(",")
    pairs = zip(given, states, strict=False)
    done = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(given), len(states)))
    return Verdict(done / max(len(given), len(states)), has_forms=False)


def states_of(problem: str) -> list[int]:
    """The states after each operation of a problem.

    Raises:
        ValueError: `problem` has another format.
    """
    match = _PROBLEM.fullmatch(problem)
    if match is None:
        raise ValueError(f"{problem[:80]!r} is not a problem of tracking, such as '7:+5*3-8'")
    state, states = int(match[1]), []
    for operator, text in _OPERATION.findall(match[2]):
        operand = int(text)
        state = state + operand if operator == "+" else state - operand if operator == "-" else state * operand
        state %= MODULUS
        states.append(state)
    return states
