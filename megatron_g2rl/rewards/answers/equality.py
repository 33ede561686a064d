"""Equality of scalars: rationals exactly, other constants to at least 40 digits, formulas at many points.

Formulas are compared at rational points of several magnitudes and both signs; polynomials that agree there are equal.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

from megatron_g2rl.rewards.answers.nodes import Node
from megatron_g2rl.rewards.answers.values import GUARD_DIGITS, SCALES, Evaluation, Point, UndefinedError

MAX_DIGITS = 2_000
"""Maximum decimal digits of irrational computations; values that need more to be compared count as unequal."""
_AGREEING = 6
"""Number of points at which two formulas must agree; three if no more points give real values."""


def same_value(a: Node, b: Node) -> bool:
    """Whether two scalars are equal, as numbers or as formulas in the same unknowns."""
    if a == b:
        return True
    real = other = 0
    other_agree = True
    for index in range(len(SCALES)):
        point = Point(index)
        agree, is_real = _agree_at(a, b, point)
        if not point.values:
            return agree is True
        if agree is None:
            continue
        if is_real:
            if not agree:
                return False
            real += 1
            if real == _AGREEING:
                return True
        else:
            other += 1
            other_agree = other_agree and agree
    return real >= 3 or (other >= 3 and other_agree)


def _agree_at(a: Node, b: Node, point: Point) -> tuple[bool | None, bool]:
    """(whether the values agree, or None if one is undefined; whether both are real)."""
    digits = 60
    for _ in range(3):
        evaluation = Evaluation(point, digits)
        try:
            x, y = evaluation.value(a), evaluation.value(b)
            if isinstance(x, Fraction) and isinstance(y, Fraction):
                return x == y, True
            x, y = evaluation.inexact(x), evaluation.inexact(y)
        except UndefinedError:
            return None, False
        mp = evaluation.mp
        needed = evaluation.digits_needed()
        if needed <= digits:
            break
        if needed > MAX_DIGITS:
            return None, False
        digits = needed
    tolerance = mp.ldexp(mp.mpf(10) ** (GUARD_DIGITS // 2 - mp.dps), max(evaluation.largest, 1))
    is_real = abs(mp.im(x)) <= tolerance and abs(mp.im(y)) <= tolerance
    return bool(abs(x - y) <= tolerance), bool(is_real)


def constant(node: Node) -> Fraction | None:
    """A real constant: exact if rational, otherwise to 45 significant digits; None for anything else."""
    return _evaluated_constant(node)[0]


def is_rational(node: Node) -> bool:
    """Whether `constant` is exact."""
    return _evaluated_constant(node)[1]


def forget_constants() -> None:
    """Clear the cache of constants, so that the work of a comparison does not depend on earlier ones."""
    _evaluated_constant.cache_clear()


@lru_cache(maxsize=4096)
def _evaluated_constant(node: Node) -> tuple[Fraction | None, bool]:
    point = Point(0)
    evaluation = Evaluation(point, 80)
    try:
        value = evaluation.value(node)
    except UndefinedError:
        return None, False
    if point.values:
        return None, False
    if isinstance(value, Fraction):
        return value, True
    mp = evaluation.mp
    if abs(mp.im(value)) > mp.mpf(10) ** -50:
        return None, False
    value = mp.re(value)
    return (Fraction(mp.nstr(value, 45, min_fixed=1, max_fixed=0)) if value else Fraction(0)), False


def proportional(a: Node, b: Node, positive: bool) -> bool:
    """Whether two formulas are equal up to a nonzero constant factor (above 0 if `positive`)."""
    ratios = set()
    for index in range(len(SCALES)):
        point = Point(index)
        evaluation = Evaluation(point, 100)
        try:
            x, y = evaluation.value(a), evaluation.value(b)
            if not point.values or x == 0 or y == 0:
                return False
            ratio = x / y if isinstance(x, Fraction) and isinstance(y, Fraction) else None
            if ratio is None:
                quotient = evaluation.inexact(x) / evaluation.inexact(y)
                if abs(evaluation.mp.im(quotient)) > 1e-40:
                    continue
                text = evaluation.mp.nstr(evaluation.mp.re(quotient), 40, min_fixed=1, max_fixed=0)
                ratio = Fraction(text)
        except UndefinedError:
            continue
        ratios.add((ratio, ratio > 0))
        if len(ratios) > 1:
            return False
    return len(ratios) == 1 and (not positive or next(iter(ratios))[1])
