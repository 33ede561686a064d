"""Countdown: reach a target from a few numbers by any correct chain of steps, such as `3*3=9,5-2=3,9+3=12`."""

from __future__ import annotations

import re

from megatron_g2rl.rewards.tasks.expressions import Form, join, number
from megatron_g2rl.rewards.tasks.verdict import Verdict, boxed_only

LARGEST = 99
"""Results of all steps are from 1 to this value."""
_STEP = re.compile(r"(\d{1,2})([-+*])(\d{1,2})=(\d{1,2})")
_PROBLEM = re.compile(r"(\d+(?: \d+)*):(\d+)")


def verify(response: str, answer: str, problem: str) -> Verdict:
    """Verify a chain of steps in a box, with nothing before or after it.

    Each step takes two of the remaining numbers and adds its result to them; the last result must be the target, and
    numbers may be left over. Its form is that of the expression of the last result, so that chains of the same
    expression have the same form. The credit of an incorrect chain is its number of correct steps before the first
    incorrect one, divided by the number of given numbers.

    Args:
        response: the response.
        answer: a correct chain, not used.
        problem: such as `3 3 5 2:12`.

    Raises:
        ValueError: `problem` has another format.
    """
    match = _PROBLEM.fullmatch(problem)
    if match is None:
        raise ValueError(f"{problem[:80]!r} is not a problem of countdown, such as '3 3 5 2:12'")
    numbers, target = [int(text) for text in match[1].split()], int(match[2])
    available = [(value, number(value)) for value in numbers]
    chain = boxed_only(response)
    steps = 0 if chain is None else chain.split(",")
    done = 0
    for step in steps or ():
        if not take_step(available, step):
            return Verdict(done / len(numbers))
        done += 1
    if not done or available[-1][0] != target:
        return Verdict(done / len(numbers))
    return Verdict(1.0, str(available[-1][1]))


def take_step(available: list[tuple[int, Form]], step: str) -> bool:
    """Replace the two numbers of a step in `available` by its result; False if the step is not correct.

    Args:
        available: values and forms; the result is appended. It is incomplete after an incorrect step.
        step: such as `3*3=9`.
    """
    match = _STEP.fullmatch(step)
    if match is None:
        return False
    operands, operator, result = (int(match[1]), int(match[3])), match[2], int(match[4])
    forms = []
    for operand in operands:
        places = [place for place, (value, _) in enumerate(available) if value == operand]
        if not places:
            return False
        # Prefer a computed result to an equal given number: otherwise the step that computed it would be unused.
        forms.append(available.pop(places[-1])[1])
    if not 1 <= result <= LARGEST or result != apply(operator, *operands):
        return False
    available.append((result, join(forms[0], operator, forms[1], result)))
    return True


def apply(operator: str, left: int, right: int) -> int:
    """Value of `left operator right`."""
    return left + right if operator == "+" else left - right if operator == "-" else left * right
