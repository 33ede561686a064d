"""Nodes of the parse tree of an answer: tuples whose first element is the kind.

Scalars: num, sym, const, add, mul, div, neg, pow, root, fn, fact, binom, deg, pct, sign (of a plus-minus).
Structures: qty (with units), list, tuple, set, builder, rel, cup, cap, setminus, empty, matrix, ratio, text, ellipsis.
"""

from __future__ import annotations

from fractions import Fraction

from megatron_g2rl.rewards.answers.tokens import ParseError

Node = tuple
STRUCTURES = frozenset(
    ["list", "tuple", "set", "rel", "cup", "cap", "setminus", "empty", "matrix", "ratio", "text", "builder", "qty"]
    + ["ellipsis"]
)


def is_scalar(node: Node) -> bool:
    return node[0] == "qty" or node[0] not in STRUCTURES


def scalar(node: Node) -> Node:
    """Return the node; raises ParseError for a structure."""
    if node[0] in STRUCTURES:
        raise ParseError(f"arithmetic with a {node[0]}")
    return node


def integer(digits: str) -> int:
    """An integer of any length (int() refuses more than 4300 digits)."""
    value = 0
    for begin in range(0, len(digits), 4000):
        piece = digits[begin : begin + 4000]
        value = value * 10 ** len(piece) + int(piece)
    return value


def number(text: str) -> Node:
    """("num", exact value, significant digits, decimal places); the last two are 0 for an integer."""
    mantissa, _, exponent = text.lower().partition("e")
    integral, point, decimals = mantissa.partition(".")
    value = Fraction(integer(integral + decimals))
    power = (int(exponent) if len(exponent) < 6 else 10**6) if exponent else 0
    if abs(power) > 20_000:
        raise ParseError("an exponent of more than 20,000")
    shift = power - len(decimals)
    value = value * 10**shift if shift >= 0 else value / 10**-shift
    if not decimals and not exponent:
        return ("num", value, 0, 0)
    return ("num", value, len((integral + decimals).lstrip("0")), -shift)
