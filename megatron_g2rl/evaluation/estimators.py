"""Accuracy of one problem from the n responses to it: mean@k, pass@k and maj@k, each without bias for n >= k.

Plain Python: n is at most some hundreds. An accuracy of a data set is the mean over its problems.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction
from math import comb


def mean_at_k(correct: Sequence[bool]) -> float:
    """Share of right responses: the chance that one response is right (pass@1).

    Args:
        correct: whether each of the n responses is right.
    """
    return sum(correct) / len(correct)


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """Chance that at least one of k responses, drawn from the n without replacement, is right.

    1 - C(n - c, k) / C(n, k) with c right ones (arXiv 2107.03374, equation 1); unbiased for any n >= k.

    Args:
        correct: whether each of the n responses is right.
        k: responses that are drawn.

    Raises:
        ValueError: k is not in 1..n.
    """
    _check(len(correct), k)
    return float(1 - Fraction(comb(len(correct) - sum(correct), k), comb(len(correct), k)))


def majority_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Chance that the most frequent answer of k responses is right, ties broken uniformly.

    Each tied answer counts with its share of the tie, so nothing is drawn. Of n > k responses, every whole run of k
    is one vote and the votes are averaged; what is left over does not vote. Answers are told apart by their text. A
    response without an answer does not vote, and a vote without any answer is wrong.

    Args:
        answers: final answer of each of the n responses (`rewards.boxed.last_boxed`), None where there is none.
        correct: whether each response is right. Where responses with the same answer differ in this (a reward that
            also judges something else), the answer counts with its share of right ones.
        k: responses that vote.

    Raises:
        ValueError: k is not in 1..n.
    """
    _check(len(answers), k)
    pairs = list(zip(answers, correct, strict=True))
    votes = [_vote(pairs[start : start + k]) for start in range(0, len(pairs) - k + 1, k)]
    return sum(votes) / len(votes)


def _vote(pairs: Sequence[tuple[str | None, bool]]) -> float:
    by_answer: dict[str, list[bool]] = defaultdict(list)
    for answer, right in pairs:
        if answer is not None:
            by_answer[answer].append(right)
    most = max(map(len, by_answer.values()), default=0)
    tied = [sum(rights) / most for rights in by_answer.values() if len(rights) == most]
    return sum(tied) / len(tied) if tied else 0.0


def _check(responses: int, k: int) -> None:
    if not 1 <= k <= responses:
        raise ValueError(f"k={k}, but there are {responses} responses: it must be from 1 to that")
