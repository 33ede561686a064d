"""Tracking: the state after a chain of operations, each of which must be right."""

from __future__ import annotations

import re

from megatron_g2rl.rewards.tasks.verdict import Verdict

MODULUS = 100
"""States are from 0 to one less than this value."""
_PROBLEM = re.compile(r"(\d{1,2}):((?:[-+*]\d{1,2})+)")
_OPERATION = re.compile(r"([-+*])(\d+)")
_RESPONSE = re.compile(r"(\d{1,2}(?:,\d{1,2})*)?\\boxed\{(\d{1,2})\}\s*")


def verify(response: str, answer: str, problem: str) -> Verdict:
    """Verify the states after each operation, followed by the last one in a box: `32,96,88\\boxed{88}`.

    A response is correct if the number in its only box is the last state, whatever the states before it. The credit of
    an incorrect one is the fraction of operations before the first incorrect state. The solution is unique, so there
    are no forms.

    Args:
        response: the response.
        answer: the last state.
        problem: such as `27:+5*3-8`; every result is modulo `MODULUS`.

    Raises:
        ValueError: `problem` has another format.
    """
    states = states_of(problem)
    match = _RESPONSE.fullmatch(response)
    if match is None:
        return Verdict(0.0, has_forms=False)
    if match[2] == str(states[-1]):
        return Verdict(1.0, has_forms=False)
    done = 0
    for given, state in zip((match[1] or "").split(","), states, strict=False):
        if given != str(state):
            break
        done += 1
    # All states may be right and the box wrong.
    return Verdict(min(done, len(states) - 1) / len(states), has_forms=False)


def states_of(problem: str) -> list[int]:
    """The states after each operation of a problem.

    Raises:
        ValueError: `problem` has another format.
    """
    match = _PROBLEM.fullmatch(problem)
    if match is None:
        raise ValueError(f"{problem[:80]!r} is not a problem of tracking, such as '27:+5*3-8'")
    state, states = int(match[1]), []
    for operator, text in _OPERATION.findall(match[2]):
        operand = int(text)
        state = state + operand if operator == "+" else state - operand if operator == "-" else state * operand
        state %= MODULUS
        states.append(state)
    return states
