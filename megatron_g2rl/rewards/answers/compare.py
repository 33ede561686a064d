"""Compares two parsed answers; docs/rewards.md describes the decisions."""

from __future__ import annotations

from fractions import Fraction

from megatron_g2rl.rewards.answers.equality import constant, proportional, same_value
from megatron_g2rl.rewards.answers.nodes import Node, is_scalar
from megatron_g2rl.rewards.answers.quantities import same_number, same_quantity, with_units
from megatron_g2rl.rewards.answers.sets import real_set
from megatron_g2rl.rewards.answers.tokens import ParseError

MAX_MEMBERS = 60
"""Longer lists are incorrect, as members are compared pairwise."""
MAX_SIGNS = 4
"""Expressions with more plus-minus signs are incorrect."""
_MIRRORED = {"<": ">", "<=": ">="}


def same_answer(gold: Node, found: Node) -> bool:
    """Whether the answers are equal as numbers, formulas, lists, tuples, sets, relations, ratios, matrices or words."""
    gold, found = _as_list(gold), _as_list(found)
    if gold == found:
        return True
    gold, found = _without_braces(gold, found), _without_braces(found, gold)
    if gold[0] == "list" and found[0] == "tuple" and found[1:3] == ("[", "]") and len(found[3]) > 2:
        found = ("list", found[3], frozenset([","]))  # [1, 2, 3] is not an interval
    kinds = {gold[0], found[0]}
    if is_scalar(gold) and is_scalar(found):
        return same_quantity(gold, found)
    if "text" in kinds:
        return gold == found
    if "ratio" in kinds:
        return _same_ratio(gold, found)
    if "matrix" in kinds:
        return _same_matrix(gold, found)
    if kinds == {"tuple"} and gold[1:3] == found[1:3] == ("(", ")"):
        return _same_in_order(gold, found)
    if kinds == {"tuple", "list"} and not any(_is_condition(node) for node in (gold, found)):
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


def _is_condition(node: Node) -> bool:
    """Whether a node is a list of relations, such as `x > 2 and x < 5`, which is a set of numbers."""
    return node[0] == "list" and all(item[0] == "rel" for item in node[1])


def _without_braces(node: Node, other: Node) -> Node:
    """5 for {5} if the other answer is a single value; {1, 2} for `x \\in {1, 2}` if the other has no name."""
    if node[0] == "rel" and node[2] == ("in",) and node[1][1][0] == "set" and other[0] not in ("rel", "builder"):
        node = node[1][1]
    return node[1][0] if node[0] == "set" and len(node[1]) == 1 and is_scalar(other) else node


# --- plus-minus


def _signs(node: object) -> set[int]:
    if not isinstance(node, tuple) or not node:
        return set()
    if node[0] == "sign":
        return {node[1]}
    return set().union(*(_signs(part) for part in node))


def _expand(node: Node) -> list[Node]:
    """All values of an expression with plus-minus signs."""
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
    """The answer with plus-minus signs expanded to a list."""
    if node[0] in ("list", "set"):
        members = tuple(value for member in node[1] for value in _expand(member))
        return (node[0], members, *node[2:])
    values = _expand(node)
    return node if len(values) == 1 else ("list", tuple(values), frozenset(["or"]))


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
    """Compare lists in any order; repetitions count, unless one of the two is a set in braces."""
    ours, theirs = list(_members(gold)), list(_members(found))
    if max(len(ours), len(theirs)) > MAX_MEMBERS:
        return False
    if "set" in (gold[0], found[0]):
        ours, theirs = _distinct(ours), _distinct(theirs)
    if len(ours) != len(theirs):
        return False
    if ("ellipsis",) in ours:
        return all(map(same_answer, ours, theirs))
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
    """Compare clock times part by part, ratios up to a factor, and 3:4 with the fraction 3/4."""
    if gold[0] != found[0]:
        ratio, other = (gold, found) if gold[0] == "ratio" else (found, gold)
        return len(ratio[1]) == 2 and is_scalar(other) and same_number(("div", *ratio[1]), with_units(other)[0])
    if len(gold[1]) != len(found[1]) or gold[3] and found[3] and gold[3] != found[3]:
        return False
    if gold[2] and found[2]:
        return all(map(same_value, gold[1], found[1]))
    return all(
        same_value(("mul", gold[1][0], theirs), ("mul", found[1][0], ours))
        for ours, theirs in zip(gold[1][1:], found[1][1:], strict=True)
    ) and not any(constant(part) == 0 for part in (*gold[1], *found[1]))


def _same_matrix(gold: Node, found: Node) -> bool:
    """Compare matrices entry by entry; a single row or column also equals a tuple."""
    if gold[0] == found[0]:
        if [len(row) for row in gold[1]] != [len(row) for row in found[1]]:
            return False
        return all(map(same_number, sum(gold[1], ()), sum(found[1], ())))
    matrix, other = (gold, found) if gold[0] == "matrix" else (found, gold)
    if other[0] != "tuple" or other[1:3] != ("(", ")") or min(len(matrix[1]), len(matrix[1][0])) != 1:
        return False
    entries = sum(matrix[1], ())
    return len(entries) == len(other[3]) and all(map(same_answer, entries, other[3]))


def _same_structure(gold: Node, found: Node) -> bool:
    """Compare sets and relations with unknowns part by part."""
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
    if len(gold[1]) != 2 or not all(map(is_scalar, (*gold[1], *found[1]))) or gold[2] == ("in",):
        return False
    differences = [("add", node[1][0], ("neg", node[1][1])) for node in (gold, found)]
    return proportional(*differences, positive=gold[2][0] not in ("=", "!="))


def _ascending(node: Node) -> Node:
    """The relation rewritten with > and >=."""
    if all(relation in _MIRRORED for relation in node[2]):
        return ("rel", node[1][::-1], tuple(_MIRRORED[relation] for relation in node[2][::-1]))
    return node
