"""Sets of real numbers: intervals, unions, inequalities and finite sets, compared as sets.

A set is a sorted list of pieces between cuts. A cut is (number, 0), just below the number, or (number, 1), just above
it: [2, 5) is the piece from (2, 0) to (5, 0), and (2, 5] the piece from (2, 1) to (5, 1).
"""

from __future__ import annotations

import math
from fractions import Fraction

from megatron_g2rl.rewards.answers.equality import constant
from megatron_g2rl.rewards.answers.nodes import Node

Cut = tuple[Fraction | float, int]
Pieces = tuple[tuple[Cut, Cut], ...]
_LEAST, _GREATEST = (-math.inf, 1), (math.inf, 0)
REALS: Pieces = ((_LEAST, _GREATEST),)
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}


def real_set(node: Node) -> tuple[str | None, Pieces] | None:
    """(unknown that the set is written in, or None; its pieces), or None if it is not a set of real constants.

    `(2, 5)` is an open interval here; the caller decides whether it is a point.
    """
    kind = node[0]
    if kind == "empty":
        return None, ()
    if kind == "sym" and node[1].startswith("\\mathbb"):
        return (None, REALS) if node[1] == "\\mathbb{R}" else None
    if kind == "tuple":
        pieces = _interval(node)
        return None if pieces is None else (None, pieces)
    if kind == "set":
        points = [constant(item) if item[0] != "qty" else None for item in node[1]]
        return None if None in points else (None, _normalize([((point, 0), (point, 1)) for point in points]))
    if kind in ("cup", "cap", "setminus"):
        left, right = real_set(node[1]), real_set(node[2])
        if left is None or right is None or None not in (left[0], right[0]) and left[0] != right[0]:
            return None
        return left[0] or right[0], _combine(kind, left[1], right[1])
    if kind == "builder":
        inner = real_set(node[2])
        return (None, inner[1]) if inner is not None and inner[0] == node[1] else None
    if kind == "rel":
        return _relation(node)
    if kind == "list" and (node[2] in ({"or"}, {"and"}) or node[2] == {","} and any(map(_is_domain, node[1]))):
        return _joined(node)
    return None


def _is_domain(node: Node) -> bool:
    """Whether a node is `x \\in \\mathbb{R}`, which conditions follow."""
    return node[0] == "rel" and node[2] == ("in",) and node[1][1] == ("sym", "\\mathbb{R}")


def _joined(node: Node) -> tuple[str | None, Pieces] | None:
    parts = [real_set(item) if item[0] in ("rel", "builder") else None for item in node[1]]
    if None in parts or len({name for name, _ in parts}) != 1:
        return None
    name, pieces = parts[0]
    for _, more in parts[1:]:
        pieces = _combine("cup" if node[2] == {"or"} else "cap", pieces, more)
    return name, pieces


def _bound(node: Node) -> Fraction | float | None:
    if node == ("const", "inf"):
        return math.inf
    if node == ("neg", ("const", "inf")):
        return -math.inf
    return constant(node) if node[0] != "qty" else None


def _interval(node: Node) -> Pieces | None:
    _, opening, closing, items = node
    if len(items) != 2:
        return None
    low, high = _bound(items[0]), _bound(items[1])
    if low is None or high is None or low >= high and not (low == high and opening + closing == "[]"):
        return None
    below = (low, 0 if opening == "[" and low != -math.inf else 1)
    above = (high, 1 if closing == "]" and high != math.inf else 0)
    return ((below, above),)


def _relation(node: Node) -> tuple[str, Pieces] | None:
    """`x > 2`, `2 < x <= 5`, `x != 3`, `x in [2, 5]`."""
    operands, relations = node[1], node[2]
    names = [operand for operand in operands if operand[0] == "sym" and not operand[1].startswith("\\mathbb")]
    if len(names) != 1:
        return None
    name, position = names[0][1], operands.index(names[0])
    if relations == ("in",):
        inner = real_set(operands[1]) if position == 0 else None
        return None if inner is None or inner[0] is not None else (name, inner[1])
    if len(operands) > 3 or len(operands) == 3 and position != 1:
        return None
    pieces = REALS
    for index, operand in enumerate(operands):
        if index == position:
            continue
        relation = relations[position] if index > position else _FLIPPED.get(relations[index])
        half = _half_line(relation, _bound(operand))
        if half is None:
            return None
        pieces = _combine("cap", pieces, half)
    if len(operands) == 3 and (relations[0][0] != relations[1][0] or relations[0][0] not in "<>"):
        return None
    return name, pieces


def _half_line(relation: str | None, bound: Fraction | float | None) -> Pieces | None:
    if bound is None or relation is None:
        return None
    if math.isinf(bound):
        above = relation == "<" and bound > 0 or relation == ">" and bound < 0
        return REALS if above else None
    return {
        "<": ((_LEAST, (bound, 0)),), "<=": ((_LEAST, (bound, 1)),),
        ">": (((bound, 1), _GREATEST),), ">=": (((bound, 0), _GREATEST),),
        "!=": ((_LEAST, (bound, 0)), ((bound, 1), _GREATEST)), "=": (((bound, 0), (bound, 1)),),
    }.get(relation)  # fmt: skip


def _normalize(pieces: list[tuple[Cut, Cut]]) -> Pieces:
    """Sort the pieces, drop empty ones and join adjacent ones."""
    joined: list[tuple[Cut, Cut]] = []
    for low, high in sorted(piece for piece in pieces if piece[0] < piece[1]):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return tuple(joined)


def _combine(kind: str, left: Pieces, right: Pieces) -> Pieces:
    if kind == "cup":
        return _normalize([*left, *right])
    if kind == "setminus":
        right = _complement(right)
    return _normalize([(max(a[0], b[0]), min(a[1], b[1])) for a in left for b in right])


def _complement(pieces: Pieces) -> Pieces:
    cuts = [_LEAST, *(cut for piece in pieces for cut in piece), _GREATEST]
    return _normalize(list(zip(cuts[::2], cuts[1::2], strict=True)))
