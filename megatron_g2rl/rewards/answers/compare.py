"""Whether two parsed answers are the same answer; docs/rewards.md has the decisions in words."""

from __future__ import annotations

from fractions import Fraction

from megatron_g2rl.rewards.answers.nodes import STRUCTURES, Node
from megatron_g2rl.rewards.answers.sets import real_set
from megatron_g2rl.rewards.answers.tokens import ParseError
from megatron_g2rl.rewards.answers.units import NO_UNITS, Units, unit_named
from megatron_g2rl.rewards.answers.values import constant, is_rational, proportional, same_value

MAX_MEMBERS = 60
"""A list with more members is wrong: members are compared in pairs."""
MAX_SIGNS = 4
"""An expression with more plus-minus signs is wrong."""
MIN_ROUNDED_DIGITS = 6
"""A decimal with this many significant digits may stand for the exact value that rounds to it."""
_PRINTED_DIGITS = (16, 17)
_DOUBLE = Fraction(1, 2**51)
"""Relative error of a double-precision number that a program printed with 16 or 17 digits."""
_TRIGONOMETRIC = frozenset(["sin", "cos", "tan", "cot", "sec", "csc"])
_MIRRORED = {"<": ">", "<=": ">="}


def same_answer(gold: Node, found: Node) -> bool:
    """Whether the answers are equal as numbers, formulas, lists, tuples, sets, relations, ratios, matrices or words."""
    gold, found = _as_list(gold), _as_list(found)
    if gold == found:
        return True
    gold, found = _without_braces(gold, found), _without_braces(found, gold)
    kinds = {gold[0], found[0]}
    if _is_scalar(gold) and _is_scalar(found):
        return _same_quantity(gold, found)
    if "text" in kinds:
        return gold == found
    if "ratio" in kinds:
        return _same_ratio(gold, found)
    if "matrix" in kinds:
        return _same_matrix(gold, found)
    if kinds == {"tuple"} and gold[1:3] == found[1:3] == ("(", ")") or kinds == {"tuple", "list"}:
        return _same_in_order(gold, found)
    sets = real_set(gold), real_set(found)
    if None not in sets and not (kinds <= {"set", "list"}):
        (gold_name, gold_pieces), (found_name, found_pieces) = sets
        return gold_pieces == found_pieces and (None in (gold_name, found_name) or gold_name == found_name)
    if kinds <= {"list", "set"}:
        return _same_members(gold, found)
    if gold[0] != found[0]:
        return False
    return _same_structure(gold, found)


def _is_scalar(node: Node) -> bool:
    return node[0] == "qty" or node[0] not in STRUCTURES


def _without_braces(node: Node, other: Node) -> Node:
    """5 for {5} where the other answer is one value."""
    return node[1][0] if node[0] == "set" and len(node[1]) == 1 and _is_scalar(other) else node


# --- plus-minus


def _signs(node: object) -> set[int]:
    if not isinstance(node, tuple) or not node:
        return set()
    if node[0] == "sign":
        return {node[1]}
    return set().union(*(_signs(part) for part in node))


def _expand(node: Node) -> list[Node]:
    """Every value of an expression with plus-minus."""
    signs = _signs(node)
    if len(signs) > MAX_SIGNS:
        raise ParseError("too many plus-minus signs")
    expanded = [node]
    for sign in sorted(signs):
        expanded = [_with_sign(part, sign, value) for part in expanded for value in (1, -1)]
    return expanded


def _with_sign(node: object, sign: int, value: int) -> object:
    if not isinstance(node, tuple) or not node:
        return node
    if node[0] == "sign" and node[1] == sign:
        return ("num", Fraction(value * node[2]), 0, 0)
    return tuple(_with_sign(part, sign, value) for part in node)


def _as_list(node: Node) -> Node:
    """The answer with plus-minus written out."""
    if node[0] in ("list", "set"):
        members = tuple(value for member in node[1] for value in _expand(member))
        return (node[0], members, *node[2:])
    values = _expand(node)
    return node if len(values) == 1 else ("list", tuple(values), frozenset(["or"]))


# --- numbers and units


def _same_quantity(gold: Node, found: Node) -> bool:
    (gold, gold_units), (found, found_units) = _with_units(gold), _with_units(found)
    if gold_units.dimensions and not found_units.dimensions:
        found, found_units = _letters_as_units(found)
    elif found_units.dimensions and not gold_units.dimensions:
        gold, gold_units = _letters_as_units(gold)
    if gold_units.dimensions and found_units.dimensions:
        if gold_units.dimensions != found_units.dimensions:
            return False
        if gold_units.size != found_units.size:
            gold = ("mul", gold, ("num", gold_units.size / found_units.size, 0, 0))
    return _same_percentage(gold, found)


def _with_units(node: Node) -> tuple[Node, Units]:
    if node[0] == "qty":
        return node[1], node[2]
    return node, Units({"angle": 1}) if _in_degrees(node) else NO_UNITS


def _in_degrees(node: object) -> bool:
    if not isinstance(node, tuple) or not node or node[:2] in [("fn", name) for name in _TRIGONOMETRIC]:
        return False
    return node[0] == "deg" or any(_in_degrees(part) for part in node)


def _letters_as_units(node: Node) -> tuple[Node, Units]:
    """5 m as five meters, where the other answer has a unit."""
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
    """18%, 0.18 and 18 for 18%; 50% also for 50, but a bare reference below 1 is a fraction: 0.5% is wrong for 0.5."""
    gold_percent, found_percent = _of_percent(gold), _of_percent(found)
    if (gold_percent is None) == (found_percent is None):
        return _same_number(gold_percent or gold, found_percent or found)
    if _same_number(gold, found):
        return True
    if gold_percent is not None:
        return _same_number(gold_percent, found)
    size = constant(gold)
    return size is not None and abs(size) >= 1 and _same_number(gold, found_percent)


def _of_percent(node: Node) -> Node | None:
    if node[0] == "neg":
        inner = _of_percent(node[1])
        return None if inner is None else ("neg", inner)
    return node[1] if node[0] == "pct" else None


def _same_number(gold: Node, found: Node) -> bool:
    if ("const", "inf") in (gold, found) or ("neg", ("const", "inf")) in (gold, found):
        return gold == found
    return same_value(gold, found) or _rounds_to(gold, found) or _rounds_to(found, gold)


def _decimal(node: Node) -> tuple[Fraction, int, Fraction] | None:
    """(value, significant digits, unit of the last place) of a written decimal, also as 1.5e-3 or 1.5 x 10^-3."""
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
    """Whether a decimal stands for an exact value: 0.333333 for 1/3, 2.6666666666666665 for 8/3, but no 0.12 for 0.123.

    What has a finite decimal is not rounded: 0.30000000000000004 is wrong for 0.3.
    """
    written = _decimal(decimal)
    value = constant(exact) if written is not None else None
    if value is None:
        return False
    approximation, digits, place = written
    error = abs(approximation - value)
    printed = digits in _PRINTED_DIGITS and error <= abs(value) * _DOUBLE and _is_printed_double(approximation)
    if is_rational(exact) and _is_finite_decimal(value):
        return False
    return printed or digits >= MIN_ROUNDED_DIGITS and error <= place / 2


def _is_printed_double(value: Fraction) -> bool:
    """Whether a program that prints a double-precision number writes these digits."""
    try:
        return Fraction(repr(float(value))) == value
    except OverflowError:
        return False


def _is_finite_decimal(value: Fraction) -> bool:
    """Whether a rational has a finite decimal; a denominator of more than 2000 bits counts as one, unread."""
    denominator = value.denominator
    if denominator.bit_length() > 2000:
        return True
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def is_rounding(exact: Node, decimal: Node) -> bool:
    """Whether a decimal, of any number of digits, is what an exact constant rounds to."""
    written, value = _decimal(decimal), constant(exact) if _is_scalar(exact) and exact[0] != "qty" else None
    return written is not None and value is not None and abs(written[0] - value) <= written[2] / 2


# --- structures


def _members(node: Node) -> tuple[Node, ...]:
    return node[1] if node[0] in ("list", "set") else node[3] if node[0] == "tuple" else (node,)


def _same_in_order(gold: Node, found: Node) -> bool:
    if any(node[0] == "tuple" and node[1:3] != ("(", ")") for node in (gold, found)):
        return False
    if any(node[0] == "list" and node[2] != {","} for node in (gold, found)):
        return False
    ours, theirs = _members(gold), _members(found)
    return len(ours) == len(theirs) and all(map(same_answer, ours, theirs))


def _same_members(gold: Node, found: Node) -> bool:
    """Lists in any order, with repetitions counted; without where one of the two is a set in braces."""
    ours, theirs = list(_members(gold)), list(_members(found))
    if max(len(ours), len(theirs)) > MAX_MEMBERS:
        return False
    if "set" in (gold[0], found[0]):
        ours, theirs = _distinct(ours), _distinct(theirs)
    if len(ours) != len(theirs):
        return False
    for member in ours:
        match = next((index for index, other in enumerate(theirs) if same_answer(member, other)), None)
        if match is None:
            return False
        del theirs[match]
    return True


def _distinct(members: list[Node]) -> list[Node]:
    distinct: list[Node] = []
    for member in members:
        if not any(same_answer(member, other) for other in distinct):
            distinct.append(member)
    return distinct


def _same_ratio(gold: Node, found: Node) -> bool:
    """Clock times digit by digit; ratios up to a factor, and 3:4 as the fraction 3/4."""
    if gold[0] != found[0]:
        ratio, other = (gold, found) if gold[0] == "ratio" else (found, gold)
        return len(ratio[1]) == 2 and _is_scalar(other) and _same_number(("div", *ratio[1]), _with_units(other)[0])
    if len(gold[1]) != len(found[1]) or gold[3] and found[3] and gold[3] != found[3]:
        return False
    if gold[2] and found[2]:
        return all(map(same_value, gold[1], found[1]))
    return all(
        same_value(("mul", gold[1][0], theirs), ("mul", found[1][0], ours))
        for ours, theirs in zip(gold[1][1:], found[1][1:], strict=True)
    ) and not any(constant(part) == 0 for part in (*gold[1], *found[1]))


def _same_matrix(gold: Node, found: Node) -> bool:
    """Matrices entry by entry; a single row or column also as a tuple."""
    if gold[0] == found[0]:
        if [len(row) for row in gold[1]] != [len(row) for row in found[1]]:
            return False
        return all(map(_same_number, sum(gold[1], ()), sum(found[1], ())))
    matrix, other = (gold, found) if gold[0] == "matrix" else (found, gold)
    if other[0] != "tuple" or other[1:3] != ("(", ")") or min(len(matrix[1]), len(matrix[1][0])) != 1:
        return False
    entries = sum(matrix[1], ())
    return len(entries) == len(other[3]) and all(map(same_answer, entries, other[3]))


def _same_structure(gold: Node, found: Node) -> bool:
    """Sets and relations with unknowns in them, part by part."""
    if gold[0] == "tuple":
        if gold[1:3] != found[1:3] or len(gold[3]) != len(found[3]):
            return False
        return all(map(same_answer, gold[3], found[3]))
    if gold[0] in ("cup", "cap"):
        return any(
            same_answer(gold[1], one) and same_answer(gold[2], other) for one, other in (found[1:3], found[2:0:-1])
        )
    if gold[0] == "setminus":
        return same_answer(gold[1], found[1]) and same_answer(gold[2], found[2])
    if gold[0] == "rel":
        return _same_relation(gold, found)
    return False


def _same_relation(gold: Node, found: Node) -> bool:
    gold, found = _ascending(gold), _ascending(found)
    if gold[2] != found[2]:
        return False
    if all(map(same_answer, gold[1], found[1])):
        return True
    if len(gold[1]) != 2 or not all(map(_is_scalar, (*gold[1], *found[1]))) or gold[2] == ("in",):
        return False
    differences = [("add", node[1][0], ("neg", node[1][1])) for node in (gold, found)]
    return proportional(*differences, positive=gold[2][0] not in ("=", "!="))


def _ascending(node: Node) -> Node:
    """The relation with its signs turned to > and >=."""
    if all(relation in _MIRRORED for relation in node[2]):
        return ("rel", node[1][::-1], tuple(_MIRRORED[relation] for relation in node[2][::-1]))
    return node
