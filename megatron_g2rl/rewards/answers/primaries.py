"""Parses the operands of arithmetic: numbers, names, brackets, fractions, roots, functions, matrices."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from megatron_g2rl.rewards.answers.nodes import Node, number, scalar
from megatron_g2rl.rewards.answers.tokens import ParseError, Token

if TYPE_CHECKING:
    from megatron_g2rl.rewards.answers.grammar import Parser

_CLOSING = {"(": (")", "]", "["), "[": ("]", ")", "["), "]": ("]", ")", "[")}
_INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec", "csc": "arccsc"}
_RENAMED = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
_SEVERAL_ARGUMENTS = ("gcd", "lcm", "max", "min")


def read_primary(parser: Parser) -> Node:
    """Parse the next primary; raises ParseError."""
    token = parser.next()
    if token.kind == "number":
        return _read_number(parser, token)
    if token.kind == "symbol":
        return ("const", token.text) if token.text in ("e", "i") else ("sym", token.text)
    if token.kind == "unit":
        return ("sym", token.text)
    if token.kind == "constant":
        return ("const", "pi" if token.text == "pi" else "inf")
    if token.kind == "function":
        return _read_function(parser, token.text)
    if token.kind == "begin":
        return _read_matrix(parser, token.text)
    reader = _READERS.get(token.text)
    if reader is None:
        raise ParseError(f"unexpected {token.text}")
    return reader(parser, token.text)


def _read_number(parser: Parser, token: Token) -> Node:
    """Parse a number or a mixed number: 2 2/3 and 2\\frac{2}{3} are 8/3."""
    node = number(token.text)
    if parser.text() == "\\frac":
        begin = parser.position
        parser.position += 1
        fraction = _read_fraction(parser, "\\frac")
        if fraction[1][0] == "num" and fraction[2][0] == "num":
            return _mixed(token, node, fraction)
        parser.position = begin
        return node
    following = parser.token()
    if following is not None and following.kind == "number" and following.blank and parser.text(1) == "/":
        if parser.kind(2) != "number":
            raise ParseError("a number after a number")
        numerator, denominator = number(parser.next().text), number(parser.tokens[parser.position + 1].text)
        parser.position += 2
        return _mixed(token, node, ("div", numerator, denominator))
    return node


def _mixed(token: Token, integral: Node, fraction: Node) -> Node:
    over, under = fraction[1], fraction[2]
    if not token.text.isdigit() or over[2] or under[2] or not 0 < over[1] < under[1]:
        raise ParseError("a mixed number with a fraction that is not below 1")
    return ("num", integral[1] + over[1] / under[1], 0, 0)


def _read_bracket(parser: Parser, opening: str) -> Node:
    bars, parser.bars = parser.bars, 0
    node = parser.list()
    closing = parser.need(*_CLOSING[opening])
    parser.bars = bars
    if node[0] == "list" and node[2] == {","}:
        opening, closing = "(" if opening == "]" else opening, ")" if closing == "[" else closing  # ]2, 5[
        return ("tuple", opening, closing, node[1])
    if (opening, closing) not in (("(", ")"), ("[", "]")):
        raise ParseError("one member between unlike brackets")
    return node


def _read_set(parser: Parser, _: str) -> Node:
    if parser.take("\\}"):
        return ("empty",)
    if parser.kind() == "symbol" and (parser.text(1) in (":", "\\mid", "|")):
        name = parser.next().text
        parser.position += 1
        node = ("builder", name, parser.list())
    elif parser.kind() == "symbol" and _is_real_domain(parser):
        name, parser.position = parser.token().text, parser.position + 4
        node = ("builder", name, parser.list())
    else:
        node = parser.list()
        if node[0] != "list" and parser.take(":", "\\mid", "|"):
            raise ParseError("a set with a domain")
        node = ("set", node[1] if node[0] == "list" else (node,))
    parser.need("\\}")
    return node


def _is_real_domain(parser: Parser) -> bool:
    """Whether a set starts with `x \\in \\mathbb{R} \\mid`."""
    domain = parser.token(2)
    is_real = domain is not None and domain.text == "\\mathbb{R}"
    return is_real and parser.text(1) == "\\in" and parser.text(3) in (":", "\\mid", "|")


def _read_group(parser: Parser, _: str) -> Node:
    bars, parser.bars = parser.bars, 0
    node = parser.group()
    parser.need("}")
    parser.bars = bars
    return node


def _read_between(name: str, closing: str):
    def read(parser: Parser, _: str) -> Node:
        node = ("fn", name, scalar(parser.sum()))
        parser.need(closing)
        return node

    return read


def _read_absolute(parser: Parser, _: str) -> Node:
    parser.bars += 1
    node = scalar(parser.sum())
    parser.bars -= 1
    parser.need("|")
    return ("fn", "abs", node)


def _read_argument(parser: Parser) -> Node:
    """Argument of \\frac or \\binom: a group in braces, or one digit, letter or command."""
    token = parser.token()
    if token is not None and token.kind == "number":
        if not token.text.isdigit():
            raise ParseError("a decimal without braces")
        parser.split_number()
        return number(parser.next().text)
    if parser.text() in ("{", "\\sqrt") or (token is not None and token.kind in ("symbol", "constant")):
        return scalar(read_primary(parser))
    raise ParseError("argument of a fraction")


def _read_fraction(parser: Parser, _: str) -> Node:
    over, under = _read_argument(parser), _read_argument(parser)
    token, before = parser.token(), parser.tokens[parser.position - 1]
    if before.kind == "number" and token is not None and token.kind == "number" and not token.blank:
        raise ParseError("digits after \\frac12")
    if _first_factor(over) == _first_factor(under) == ("sym", "d"):
        raise ParseError("a derivative")
    return ("div", over, under)


def _first_factor(node: Node) -> Node:
    while node[0] in ("mul", "pow"):
        node = node[1]
    return node


def _read_binomial(parser: Parser, _: str) -> Node:
    return ("binom", _read_argument(parser), _read_argument(parser))


def _read_root(parser: Parser, _: str) -> Node:
    degree: Node = ("num", Fraction(2), 0, 0)
    if parser.take("["):
        degree = scalar(parser.sum())
        parser.need("]")
    if parser.kind() == "number":  # \sqrt12 is read as \sqrt{12}, unlike in TeX
        return ("root", number(parser.next().text), degree)
    return ("root", scalar(read_primary(parser)), degree)


def _read_function(parser: Parser, name: str) -> Node:
    name = _RENAMED.get(name, name)
    power: Node | None = None
    base: tuple[Node, ...] = ()
    while (mark := parser.take("^", "_")) is not None:
        if mark == "_":
            base = (_read_base(parser),)
        elif parser.text() == "\\circ":
            raise ParseError("degrees of a function")
        else:
            power = scalar(parser.exponent())
    if base and name != "log":
        raise ParseError(f"an index of {name}")
    if power == ("neg", ("num", Fraction(1), 0, 0)):
        if name not in _INVERSES:
            raise ParseError(f"the inverse of {name}")
        name, power = _INVERSES[name], None
    if name == "lg" or name == "log" and not base and parser.reading.log_base == "ten":
        name, base = "log", (number("10"),)
    elif name == "log" and not base:
        name = "ln"
    node = ("fn", name, *_read_arguments(parser, name), *base)
    return node if power is None else ("pow", node, power)


def _read_base(parser: Parser) -> Node:
    """Parse the base of a logarithm; \\log_28 is \\log_2 8."""
    if parser.kind() == "number":
        parser.split_number()
        return number(parser.next().text)
    return scalar(read_primary(parser))


def _read_arguments(parser: Parser, name: str) -> tuple[Node, ...]:
    if parser.text() in ("(", "[", "{"):
        node = read_primary(parser)
        if name in _SEVERAL_ARGUMENTS and node[0] in ("tuple", "list"):
            return tuple(scalar(item) for item in node[3 if node[0] == "tuple" else 1])
        return (scalar(node),)
    if parser.text() == "|":
        return (read_primary(parser),)
    factors = []
    while parser.kind() in ("number", "symbol", "constant") or parser.text() in ("\\frac", "\\sqrt"):
        if factors and parser.kind() == "number":
            raise ParseError("a number inside an argument without brackets")
        factors.append(scalar(parser.power()))
    if not factors:
        raise ParseError(f"{name} without an argument")
    return (factors[0] if len(factors) == 1 else ("mul", *factors),)


def _read_matrix(parser: Parser, environment: str) -> Node:
    if environment in ("vmatrix", "Vmatrix"):
        raise ParseError("a determinant")
    rows, row = [], []
    while True:
        if parser.kind() == "end":
            parser.position += 1
            break
        row.append(scalar(parser.sum()))
        if parser.take("\\\\"):
            rows.append(tuple(row))
            row = []
        elif parser.kind() != "end":
            parser.need("&")
    if row:
        rows.append(tuple(row))
    if len({len(row) for row in rows}) != 1:
        raise ParseError("rows of a matrix differ in length")
    return ("matrix", tuple(rows))


_READERS = {
    "(": _read_bracket, "[": _read_bracket, "]": _read_bracket, "\\{": _read_set, "{": _read_group, "|": _read_absolute,
    "\\frac": _read_fraction, "\\binom": _read_binomial, "\\sqrt": _read_root,
    "\\lfloor": _read_between("floor", "\\rfloor"), "\\lceil": _read_between("ceil", "\\rceil"),
    "\\emptyset": lambda _, __: ("empty",),
}  # fmt: skip
