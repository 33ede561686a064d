"""Tokenizes a normalized answer: numbers, letters, words, functions, operators. Unknown commands are errors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh coth ln log lg exp sqrt asin acos atan"
    " floor ceil abs arsinh arcosh artanh Re Im gcd lcm max min".split()
)
CONSTANTS = frozenset(["pi", "infty", "inf", "infinity"])
_GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho varrho sigma tau"
    " upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar"
    " clubsuit diamondsuit heartsuit spadesuit triangle square".split()
)
_COMMANDS = frozenset(
    "frac sqrt over choose ldots cdot times div pm mp binom circ le ge ne in cup cap setminus emptyset lfloor rfloor"
    " lceil rceil mid { } | \\ % $ # &".split()
)
WORDS = frozenset(
    "or and no yes on in if per sq cm mm km kg mg ml lb lbs oz ft yd mi am pm hr hrs min sec mph kph usd eur"
    " gbp".split()
)
"""Two- and three-letter words; any other run of two or three letters is a product of letters."""
_UNIT_SYMBOLS = frozenset("Hz kHz MHz kJ kW Pa kPa mol rad nm".split())
"""The same after a number, case-sensitive."""
_SEPARATING = {"or": "or", "and": "and", "U": "cup"}
# Mantissa and exponent; an integer before a lowercase "e" can also be a multiple of Euler's number.
_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:(?:E|(?<=[\d.])e)[+-]?\d+(?![\d.A-Za-z]))?")
_PLAIN_NUMBER = re.compile(r"\d+\.?\d*|\.\d+")
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?![\d,])")
_WRAPPED_SYMBOL = re.compile(
    r"\\(?:mathbb|mathcal|mathfrak|mathscr|vec|hat|bar|tilde|overline|overrightarrow|overleftrightarrow|widehat|dot)"
    r"\s*(?:\{\s*([A-Za-z0-9 ]+)\s*\}|([A-Za-z]))"
)
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([bpvVB]?matrix|array)\}(?:\s*\{[clr|]*\})?")
_TEXT_LETTER = re.compile(r"\\text\{([A-Za-z])\}")
_COMMAND = re.compile(r"\\([A-Za-z]+|[{}|\\%$#&])")
_LETTERS = re.compile(r"[A-Za-z]{3,}(?:[-'][A-Za-z]{4,})+|[A-Za-z]+")
_SUBSCRIPT = re.compile(r"\s*_\s*(?:\{([^{}]*)\}|([A-Za-z0-9]))")


class ParseError(ValueError):
    """The answer is not in the grammar."""


@dataclass(frozen=True)
class Reading:
    """How to resolve ambiguous notation."""

    group_commas: bool = True
    """Inside brackets, `1,234` is one number."""
    exponents: bool = True
    """`2e3` is 2000, not 2 times e times 3."""
    log_base: str = "ten"
    """Base of a logarithm without one: "ten" or "e"."""


def readings(answer: str) -> list[Reading]:
    """All readings of an answer; nearly all answers have one."""
    commas = [True, False] if re.search(r"[(\[{].*\d,\d{3}(?!\d)", answer) else [True]
    exponents = [True, False] if re.search(r"\de[+-]?\d", answer) else [True]
    bases = ["ten", "e"] if re.search(r"log(?!\s*_)", answer) else ["ten"]
    return [Reading(*choice) for choice in product(commas, exponents, bases)]


@dataclass(frozen=True)
class Token:
    """One token; `kind` is number, symbol, constant, function, word, unit, begin, end or op."""

    kind: str
    text: str
    blank: bool
    """Whether white space precedes the token."""


def tokenize(answer: str, reading: Reading) -> list[Token]:
    """Tokens of an answer; raises ParseError at an unknown command or character. Time is linear in its length."""
    tokens: list[Token] = []
    position, depth, length = 0, 0, len(answer)
    while position < length:
        blank = False
        while position < length and answer[position].isspace():
            position, blank = position + 1, True
        if position == length:
            break
        character = answer[position]
        if character.isdigit() and character.isascii() or character == ".":
            match = _GROUPED.match(answer, position) if depth == 0 or reading.group_commas else None
            match = match or (_NUMBER if reading.exponents else _PLAIN_NUMBER).match(answer, position)
            if match is None:
                raise ParseError("a dot without digits")
            tokens.append(Token("number", match[0].replace(",", ""), blank))
            position = match.end()
            continue
        if character == "\\":
            new, position = _command(answer, position, blank)
        elif character.isalpha() and character.isascii():
            new, position = _letters(answer, position, blank, tokens)
        elif character in "+-*/^!|()[]{}<>,;:%$=&_€£¥'\"":
            new, position = [Token("op", character, blank)], position + 1
        else:
            raise ParseError(f"unexpected {character!r}")
        depth += sum(token.text in ("(", "[", "\\{") for token in new) - sum(t.text in (")", "]", "\\}") for t in new)
        tokens.extend(new)
    return tokens


def _command(answer: str, position: int, blank: bool) -> tuple[list[Token], int]:
    for pattern, kind in ((_TEXT_LETTER, "unit"), (_WRAPPED_SYMBOL, "symbol"), (_ENVIRONMENT, "")):
        if match := pattern.match(answer, position):
            if not kind:
                return [Token(match[1], match[2], blank)], match.end()
            name = match[1] or match[2]
            if kind == "symbol":
                name, end = _with_subscript(answer, match.end(), match[0].replace(" ", ""))
                return [Token(kind, name, blank)], end
            return [Token("symbol" if name in ("e", "i") else kind, name, blank)], match.end()
    match = _COMMAND.match(answer, position)
    if match is None:
        raise ParseError("a stray backslash")
    name, end = match[1], match.end()
    if name in FUNCTIONS and name != "sqrt":
        return [Token("function", name, blank)], end
    if name in CONSTANTS:
        return [Token("constant", name, blank)], end
    if name in _GREEK:
        name, end = _with_subscript(answer, end, "\\" + name)
        return [Token("symbol", name, blank)], end
    if name in _COMMANDS:
        return [Token("op", "\\" + name if name.isalpha() or name in "{}|\\" else name, blank)], end
    raise ParseError(f"unknown command {name}")


def _letters(answer: str, position: int, blank: bool, before: list[Token]) -> tuple[list[Token], int]:
    """Tokenize a run of letters: a function, a constant, a word, or one symbol per letter."""
    run = _LETTERS.match(answer, position)
    text, end = run[0], run.end()
    if text == "in" and before and before[-1].kind == "symbol":
        return [Token("op", "\\in", blank)], end
    if text in _SEPARATING and (text != "U" or blank):
        return [Token("op", "\\cup" if text == "U" else text, blank)], end
    if text == "sqrt":
        return [Token("op", "\\sqrt", blank)], end
    if text in FUNCTIONS and text not in ("min", "max", "Re", "Im"):
        return [Token("function", text, blank)], end
    if text in CONSTANTS:
        return [Token("constant", text, blank)], end
    after_value = bool(before) and (before[-1].kind in ("number", "unit", "word") or before[-1].text in (")", "}", "/"))
    is_word = len(text) >= 4 or not text.isalpha() or after_value and text in _UNIT_SYMBOLS
    if is_word or text.lower() in WORDS and (after_value or len(text) < 4 and blank):
        return [Token("word", text, blank)], end
    if len(text) == 3 and blank and after_value and re.search("[aeiou]", text) and list(text) != sorted(text):
        return [Token("word", text, blank)], end
    if not before and text.lower() in ("no", "yes", "usd", "eur", "gbp"):
        return [Token("word", text, blank)], end
    tokens = []
    for index, letter in enumerate(text):
        if index == len(text) - 1:
            letter, end = _with_subscript(answer, end, letter)
        tokens.append(Token("symbol", letter, blank and index == 0))
    return tokens, end


def _with_subscript(answer: str, position: int, name: str) -> tuple[str, int]:
    if subscript := _SUBSCRIPT.match(answer, position):
        index = (subscript[1] or subscript[2] or "").replace(" ", "")
        return f"{name}_{index}", subscript.end()
    return name, position
