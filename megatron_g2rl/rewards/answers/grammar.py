"""Parses a normalized answer into a tree (`nodes.py`).

Anything outside the grammar raises ParseError: no part of an answer is ever skipped. Nothing is evaluated here.
"""

from __future__ import annotations

from fractions import Fraction

from megatron_g2rl.rewards.answers.nodes import STRUCTURES, Node, number, scalar
from megatron_g2rl.rewards.answers.primaries import read_primary
from megatron_g2rl.rewards.answers.tokens import ParseError, Reading, Token, tokenize
from megatron_g2rl.rewards.answers.units import NO_UNITS, read_units

RELATIONS = {"<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\in": "in", "=": "="}
_SEPARATORS = {",": ",", ";": ",", "or": "or", "and": "and", "&": "and"}
_CURRENCIES = ("$", "€", "£", "¥")
_EMPTY = ("no solution", "no solutions", "no real solution", "no real solutions", "empty set")
_SET_OPERATORS = {"\\cup": "cup", "\\cap": "cap", "\\setminus": "setminus"}


def parse(answer: str, reading: Reading = Reading()) -> Node:  # noqa: B008
    """Tree of a normalized answer; raises ParseError. Recursion depth follows the nesting of brackets."""
    return Parser(tokenize(answer, reading), reading).answer()


class Parser:
    """Recursive-descent parser over the tokens; `primaries.py` parses the operands."""

    def __init__(self, tokens: list[Token], reading: Reading) -> None:
        self.tokens, self.reading, self.position = tokens, reading, 0
        self.signs, self.bars = 0, 0

    # --- tokens

    def text(self, ahead: int = 0) -> str | None:
        """The operator `ahead` tokens from here; None for other tokens and at the end."""
        token = self.token(ahead)
        return token.text if token is not None and token.kind == "op" else None

    def token(self, ahead: int = 0) -> Token | None:
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else None

    def kind(self, ahead: int = 0) -> str | None:
        token = self.token(ahead)
        return token.kind if token is not None else None

    def take(self, *operators: str) -> str | None:
        """Consume the next token if it is one of these operators."""
        text = self.text()
        if text not in operators:
            return None
        self.position += 1
        return text

    def need(self, *operators: str) -> str:
        operator = self.take(*operators)
        if operator is None:
            raise ParseError(f"expected {operators}")
        return operator

    # --- structures

    def answer(self) -> Node:
        node = self.group()
        if self.position < len(self.tokens):
            raise ParseError(f"unexpected {self.token().text} at the end")
        return node

    def group(self) -> Node:
        """A list, or TeX's infix forms `1 \\over 2` and `n \\choose k`."""
        node = self.list()
        if (operator := self.take("\\over", "\\choose")) is not None:
            return ("div" if operator == "\\over" else "binom", scalar(node), scalar(self.list()))
        return node

    def list(self) -> Node:
        """One item, or ("list", items, separators)."""
        items, separators = [self.item()], []
        while (separator := self.take(*_SEPARATORS)) is not None:
            while (another := self.take(*_SEPARATORS)) is not None:  # ", and"
                separator = another
            separators.append(_SEPARATORS[separator])
            items.append(self.item())
        return items[0] if not separators else ("list", tuple(items), frozenset(separators))

    def item(self) -> Node:
        if self.kind() == "word" and not self._is_currency_word():
            return self.words()
        if self.take("\\ldots"):
            return ("ellipsis",)
        operands, relations = [self.union()], []
        while (relation := self.take(*RELATIONS)) is not None:
            relations.append(RELATIONS[relation])
            operands.append(self.union())
        return operands[0] if not relations else ("rel", tuple(operands), tuple(relations))

    def words(self) -> Node:
        words = []
        while self.kind() in ("word", "unit", "symbol"):
            words.append(self.token().text.lower())
            self.position += 1
        if " ".join(words) in _EMPTY:
            return ("empty",)
        return ("text", tuple(words))

    def union(self) -> Node:
        node = self.ratio()
        while (operator := self.take(*_SET_OPERATORS)) is not None:
            node = (_SET_OPERATORS[operator], node, self.ratio())
        return node

    def ratio(self) -> Node:
        begin, parts = self.position, [self.quantity()]
        while self.take(":"):
            parts.append(self.quantity())
        if len(parts) == 1:
            return parts[0]
        numbers = [token.text for token in self.tokens[begin : self.position] if token.kind == "number"]
        is_clock = len(numbers) == len(parts) and all(len(text) == 2 for text in numbers[1:]) and len(numbers[0]) <= 2
        half = parts[-1][2] if parts[-1][0] == "qty" else NO_UNITS
        values = tuple(part[1] if part[0] == "qty" else part for part in parts)
        return ("ratio", values, is_clock, tuple(half.dimensions))

    def quantity(self) -> Node:
        """A scalar with its units, or a structure."""
        words, signs = [], []
        if self.text() == "-" and self.text(1) in _CURRENCIES:
            signs.append(self.take("-"))
        if (currency := self.take(*_CURRENCIES)) is not None:
            words.append(currency)
        elif self._is_currency_word():
            words.append(self.token().text)
            self.position += 1
        node = self.sum()
        if node[0] in STRUCTURES:
            if words or self.kind() in ("word", "unit"):
                raise ParseError("units of a structure")
            return node
        node = ("neg", node) if signs else node
        words += self.unit_words()
        if not words:
            return node
        units = read_units(words)
        if units is None:
            raise ParseError("words that change the value")
        if units.multiple != 1:
            node = ("mul", node, ("num", Fraction(units.multiple), 0, 0))
        while units.dimensions and self.kind() == "number":  # 5 feet 6 inches
            more = self.quantity()
            if more[0] != "qty" or more[2].dimensions != units.dimensions or more[2].size >= units.size:
                raise ParseError("a quantity of mixed units")
            node = ("add", node, ("mul", more[1], ("num", more[2].size / units.size, 0, 0)))
        return ("qty", node, units)

    def _is_currency_word(self) -> bool:
        token = self.token()
        if token is None or token.kind != "word" or self.kind(1) != "number":
            return False
        return token.text.lower() in ("usd", "eur", "gbp")

    def unit_words(self) -> list[str]:
        words: list[str] = []
        while True:
            token = self.token()
            if token is None:
                return words
            if token.kind in ("word", "unit") or token.text in _CURRENCIES:
                words.append(token.text)
            elif words and token.kind == "symbol" and len(words) < 4 and words[-1] in ("/", "per"):
                words.append(token.text)
            elif words and token.text == "/" and self.kind(1) in ("word", "unit", "symbol"):
                words.append("/")
            elif words and token.text in ("*", "\\cdot") and self.kind(1) in ("word", "unit"):
                pass
            elif words and token.text == "^":
                words.append(self.unit_power())
                continue
            else:
                return words
            self.position += 1

    def unit_power(self) -> str:
        self.need("^")
        braced, minus = self.take("{"), self.take("-")
        token = self.token()
        if token is None or token.kind != "number" or not token.text.isdigit() or len(token.text) > 1:
            raise ParseError("power of a unit")
        self.position += 1
        if braced:
            self.need("}")
        return f"^{minus or ''}{token.text}"

    # --- arithmetic

    def sum(self) -> Node:
        first = self.signed_term()
        terms = [first]
        while (operator := self.take("+", "-", "\\pm", "\\mp")) is not None:
            if self.text() in ("+", "\\pm", "\\mp"):
                raise ParseError("two signs")
            terms.append(self.with_sign(operator, scalar(self.signed_term())))
        if len(terms) == 1:
            return first
        scalar(first)
        return ("add", *terms)

    def signed_term(self) -> Node:
        sign = self.take("+", "-", "\\pm", "\\mp")
        if sign is None:
            return self.product()
        if self.text() in ("+", "-", "\\pm", "\\mp"):
            raise ParseError("two signs")
        node = self.product()
        # Signs apply to scalars only; a structure after a sign is an error.
        return self.with_sign(sign, scalar(node))

    def with_sign(self, sign: str, node: Node) -> Node:
        if sign == "-":
            return ("neg", node)
        if sign == "\\pm":
            self.signs += 1
            return ("mul", ("sign", self.signs, 1), node)
        if sign == "\\mp":
            # The opposite sign of the preceding plus-minus.
            self.signs = max(self.signs, 1)
            return ("mul", ("sign", self.signs, -1), node)
        return node

    def product(self) -> Node:
        node = self.power()
        while True:
            operator = self.take("*", "\\cdot", "\\times", "/", "\\div")
            if operator in ("/", "\\div"):
                node = ("div", scalar(node), scalar(self.factor_after_operator()))
            elif operator is not None:
                node = ("mul", scalar(node), scalar(self.factor_after_operator()))
            elif node[0] not in STRUCTURES and self.starts_factor():
                node = ("mul", node, scalar(self.power()))
            else:
                return node

    def factor_after_operator(self) -> Node:
        if self.take("-"):
            return ("neg", scalar(self.power()))
        return self.power()

    def starts_factor(self) -> bool:
        """Whether the next token begins a factor of an implicit multiplication."""
        token, before = self.token(), self.tokens[self.position - 1]
        if token is None:
            return False
        if token.kind == "number":
            # 1 2 is neither a number nor a product; x2 could be a power, an index or a product.
            if before.kind in ("number", "symbol", "constant") or before.text == "!" and self.text(1) != "!":
                raise ParseError("a number after a number or a letter")
            return True
        if token.kind in ("symbol", "constant", "function", "begin"):
            return True
        return token.text in ("(", "{", "\\frac", "\\sqrt", "\\binom", "\\lfloor", "\\lceil") or (
            token.text == "|" and not self.bars
        )

    def power(self) -> Node:
        node = read_primary(self)
        while (operator := self.take("!", "^", "%")) is not None:
            scalar(node)
            if operator == "!":
                if self.text() == "!":
                    raise ParseError("a double factorial")
                node = ("fact", node)
            elif operator == "%":
                node = ("pct", node)
            elif self.take("\\circ"):
                node = ("deg", node)
            elif self.text() == "{" and self.text(1) == "\\circ" and self.text(2) == "}":
                self.position += 3
                node = ("deg", node)
            else:
                node = ("pow", node, scalar(self.exponent()))
        return node

    def exponent(self) -> Node:
        if self.take("-"):
            return ("neg", scalar(self.exponent()))
        if self.kind() == "number":
            return number(self.next().text)
        node = read_primary(self)
        if self.take("^"):  # 2^3^4, right to left
            return ("pow", scalar(node), scalar(self.exponent()))
        return node

    def next(self) -> Token:
        token = self.token()
        if token is None:
            raise ParseError("the answer ends here")
        self.position += 1
        return token

    def split_number(self) -> None:
        """Split the first digit off the next token: \\frac12 is one half."""
        token = self.token()
        if len(token.text) > 1:
            pieces = [Token("number", token.text[:1], token.blank), Token("number", token.text[1:], False)]
            self.tokens[self.position : self.position + 1] = pieces
