"""Equality of quantities: numbers or formulas with units, percent signs and decimals."""

from __future__ import annotations

from fractions import Fraction

from megatron_g2rl.rewards.answers.equality import constant, is_rational, same_value
from megatron_g2rl.rewards.answers.nodes import Node, is_scalar
from megatron_g2rl.rewards.answers.units import NO_UNITS, Units, unit_named

MIN_ROUNDED_DIGITS = 6
"""A decimal with at least this many significant digits may equal an exact value that rounds to it."""
_PRINTED_DIGITS = (16, 17)
_DOUBLE = Fraction(1, 2**51)
"""Relative error of a double-precision number that a program printed with 16 or 17 digits."""
_TRIGONOMETRIC = frozenset(["sin", "cos", "tan", "cot", "sec", "csc"])


def same_quantity(gold: Node, found: Node) -> bool:
    (gold, gold_units), (found, found_units) = with_units(gold), with_units(found)
    if gold_units.dimensions and not found_units.dimensions:
        found, found_units = _letters_as_units(found)
    elif found_units.dimensions and not gold_units.dimensions:
        gold, gold_units = _letters_as_units(gold)
    if gold_units.dimensions and _of_percent(found) or found_units.dimensions and _of_percent(gold):
        return False
    if gold_units.dimensions and found_units.dimensions:
        if gold_units.dimensions != found_units.dimensions:
            return False
        if gold_units.size != found_units.size:
            gold = ("mul", gold, ("num", gold_units.size / found_units.size, 0, 0))
    return _same_percentage(gold, found)


def with_units(node: Node) -> tuple[Node, Units]:
    if node[0] == "qty":
        return node[1], node[2]
    return node, Units({"angle": 1}) if _in_degrees(node) else NO_UNITS


def _in_degrees(node: object) -> bool:
    if not isinstance(node, tuple) or not node or node[:2] in [("fn", name) for name in _TRIGONOMETRIC]:
        return False
    return node[0] == "deg" or any(_in_degrees(part) for part in node)


def _letters_as_units(node: Node) -> tuple[Node, Units]:
    """Read 5 m as five meters, for use if the other answer has a unit."""
    if node[0] not in ("mul", "div") or len(node) != 3:
        return node, NO_UNITS
    rest, units = _letters_as_units(node[1])
    letter, power = node[2], 1
    if letter[0] == "pow" and letter[2][0] == "num" and letter[2][1] in (2, 3):
        letter, power = letter[1], int(letter[2][1])
    named = unit_named(letter[1]) if letter[0] == "sym" else None
    if named is None:
        return node, NO_UNITS
    return rest, units.times(named, power if node[0] == "mul" else -power)


def _same_percentage(gold: Node, found: Node) -> bool:
    """18%, 0.18 and 18 equal 18%; 50% equals 50, but a reference below 1 is a fraction: 0.5% does not equal 0.5."""
    gold_percent, found_percent = _of_percent(gold), _of_percent(found)
    if (gold_percent is None) == (found_percent is None):
        return same_number(gold_percent or gold, found_percent or found)
    if same_number(gold, found):
        return True
    if gold_percent is not None:
        return same_number(gold_percent, found)
    size = constant(gold)
    return size is not None and abs(size) >= 1 and same_number(gold, found_percent)


def _of_percent(node: Node) -> Node | None:
    if node[0] == "neg":
        inner = _of_percent(node[1])
        return None if inner is None else ("neg", inner)
    return node[1] if node[0] == "pct" else None


def same_number(gold: Node, found: Node) -> bool:
    if ("const", "inf") in (gold, found) or ("neg", ("const", "inf")) in (gold, found):
        return gold == found
    return same_value(gold, found) or _rounds_to(gold, found) or _rounds_to(found, gold)


def _decimal(node: Node) -> tuple[Fraction, int, Fraction] | None:
    """(value, significant digits, unit of the last place) of a decimal, also of 1.5e-3 or 1.5 x 10^-3."""
    if node[0] == "num" and node[2]:
        return node[1], node[2], Fraction(10) ** -node[3]
    if node[0] in ("neg", "pct"):
        inner, factor = _decimal(node[1]), Fraction(-1) if node[0] == "neg" else Fraction(1, 100)
        return None if inner is None else (inner[0] * factor, inner[1], inner[2] * abs(factor))
    if node[0] == "mul" and len(node) == 3 and node[2][0] == "pow" and node[2][1] == ("num", Fraction(10), 0, 0):
        inner, power = _decimal(node[1]), constant(node[2])
        return None if inner is None or power is None else (inner[0] * power, inner[1], inner[2] * power)
    return None


def _rounds_to(exact: Node, decimal: Node) -> bool:
    """Whether a decimal equals an exact value up to rounding: 0.333333 for 1/3, but not 0.12 for 0.123.

    Values with a finite decimal are not rounded: 0.30000000000000004 does not equal 0.3. For any other rational, the
    digits must suffice to distinguish it from all fractions with denominators up to its own.
    """
    written = _decimal(decimal)
    value = constant(exact) if written is not None else None
    if value is None:
        return False
    approximation, digits, place = written
    error = abs(approximation - value)
    printed = digits in _PRINTED_DIGITS and error <= abs(value) * _DOUBLE and _is_printed_double(approximation)
    if is_rational(exact) and (_is_finite_decimal(value) or 2 * value.denominator**2 * place > 1):
        return False
    return printed or digits >= MIN_ROUNDED_DIGITS and error <= place / 2


def _is_printed_double(value: Fraction) -> bool:
    """Whether these digits are the printed form (repr) of a double-precision number."""
    try:
        return Fraction(repr(float(value))) == value
    except OverflowError:
        return False


def _is_finite_decimal(value: Fraction) -> bool:
    """Whether a rational has a finite decimal; denominators of more than 2000 bits are assumed to."""
    denominator = value.denominator
    if denominator.bit_length() > 2000:
        return True
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def is_rounding(exact: Node, decimal: Node) -> bool:
    """Whether an exact constant rounds to a decimal with any number of digits."""
    written, value = _decimal(decimal), constant(exact) if is_scalar(exact) and exact[0] != "qty" else None
    return written is not None and value is not None and abs(written[0] - value) <= written[2] / 2
