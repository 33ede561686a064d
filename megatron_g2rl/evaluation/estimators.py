"""Unbiased estimates of the accuracy on one problem from n responses: mean@k, pass@k and maj@k, for n >= k.

Plain Python, as n is at most a few hundred. The accuracy on a data set is the mean over its problems.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from math import comb


def mean_at_k(correct: Sequence[bool]) -> float:
    """Fraction of correct responses: the probability that one response is correct (pass@1).

    Args:
        correct: whether each of the n responses is correct.
    """
    return sum(correct) / len(correct)


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """Probability that at least one of k responses, drawn from the n without replacement, is correct.

    1 - C(n - c, k) / C(n, k) with c correct responses (arXiv 2107.03374, equation 1); unbiased for any n >= k.

    Args:
        correct: whether each of the n responses is correct.
        k: number of drawn responses.

    Raises:
        ValueError: k is not in 1..n.
    """
    _check(len(correct), k)
    return float(1 - Fraction(comb(len(correct) - sum(correct), k), comb(len(correct), k)))


def distinct_at_k(forms: Sequence[str | None], k: int) -> float:
    """Expected number of different canonical forms among k responses, drawn from the n without replacement.

    The sum over forms of the probability that one of their c responses is drawn, 1 - C(n - c, k) / C(n, k); unbiased
    for any n >= k.

    Args:
        forms: canonical form of each of the n responses; "" or None for those that do not count, such as incorrect
            ones.
        k: number of drawn responses.

    Raises:
        ValueError: k is not in 1..n.
    """
    _check(len(forms), k)
    counts = Counter(form for form in forms if form)
    return sum(pass_at_k([True] * count + [False] * (len(forms) - count), k) for count in counts.values())


def majority_at_k(answers: Sequence[str | None], correct: Sequence[bool], k: int) -> float:
    """Probability that the most frequent answer among k responses is correct, ties broken uniformly.

    Tied answers are averaged, so the result is deterministic. For n > k, each consecutive block of k responses is one
    vote and the votes are averaged; leftover responses are ignored. Answers are compared by their text. A response
    without an answer does not vote, and a vote without any answer is incorrect.

    Args:
        answers: final answer of each of the n responses (`rewards.boxed.last_boxed`); None without one.
        correct: whether each response is correct. If responses with the same answer differ (a reward that also scores
            something else), the answer counts with its fraction of correct responses.
        k: number of responses per vote.

    Raises:
        ValueError: k is not in 1..n.
    """
    _check(len(answers), k)
    pairs = list(zip(answers, correct, strict=True))
    votes = [_vote(pairs[start : start + k]) for start in range(0, len(pairs) - k + 1, k)]
    return sum(votes) / len(votes)


def _vote(pairs: Sequence[tuple[str | None, bool]]) -> float:
    by_answer: dict[str, list[bool]] = defaultdict(list)
    for answer, is_correct in pairs:
        if answer is not None:
            by_answer[answer].append(is_correct)
    most = max(map(len, by_answer.values()), default=0)
    tied = [sum(votes) / most for votes in by_answer.values() if len(votes) == most]
    return sum(tied) / len(tied) if tied else 0.0


def _check(responses: int, k: int) -> None:
    if not 1 <= k <= responses:
        raise ValueError(f"k={k} with {responses} responses: k must be in 1..{responses}")
