"""Sorting: letters in the order of their keys; letters with equal keys may be in any order."""

from __future__ import annotations

import re

from megatron_g2rl.rewards.tasks.verdict import Verdict, boxed_only

_PROBLEM = re.compile(r"[a-z]\d(?: [a-z]\d)*")


def verify(response: str, answer: str, problem: str) -> Verdict:
    """Verify an order of letters in a box, with nothing before or after it: `\\boxed{bdac}`.

    The credit is the fraction of positions at which a letter that was not used before has the right key, relative to
    the longer of the response and the problem. The form of a correct response is its order.

    Args:
        response: the response.
        answer: a correct order, not used.
        problem: such as `a3 b1 c4 d1`.

    Raises:
        ValueError: `problem` has another format.
    """
    keys = keys_of(problem)
    order = boxed_only(response)
    if not order:
        return Verdict(0.0)
    right, used = 0, set()
    for letter, key in zip(order, sorted(keys.values()), strict=False):
        right += keys.get(letter) == key and letter not in used
        used.add(letter)
    credit = right / max(len(keys), len(order))
    return Verdict(credit, order if credit == 1.0 else None)


def keys_of(problem: str) -> dict[str, int]:
    """The key of each letter of a problem.

    Raises:
        ValueError: `problem` has another format.
    """
    if not _PROBLEM.fullmatch(problem):
        raise ValueError(f"{problem[:80]!r} is not a problem of sorting, such as 'a3 b1 c4 d1'")
    return {item[0]: int(item[1]) for item in problem.split()}
