"""Names and equations in an answer: `x = 5` is 5 with a name, `2 + 3 = 5` is 5, and `x^2 - 4x = 0` is not 0."""

from __future__ import annotations

import re
from dataclasses import dataclass

_EQUALS = re.compile(
    r"(?<![<>!\\])(?::=|=)|\\(?:equiv|simeq|cong|doteq|to|implies|iff|(?:long)?(?:left)?rightarrow|Rightarrow"
    r"|Leftrightarrow|Longrightarrow|Longleftrightarrow)(?![A-Za-z])|[≡→⇒⇔]"
)
_SEPARATOR = re.compile(
    r",(?!\d{3}(?!\d))|;|\\(?:text|mathrm)\s*\{\s*(?:or|and)\s*\}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])"
)
# A name: letters and non-operator commands, optionally with subscripts, primes, ^{-1} and plain arguments.
_WORD = (
    r"(?:\\(?:text|mathrm|mathbf|mathit|mathcal|operatorname|overline|vec|hat|bar|mathbb)\{[A-Za-z .']*+\}"
    r"|\\(?!frac|dfrac|tfrac|cdot|times|div|sqrt|sum|prod|int|binom|pm|mp|log|ln|lg|exp|text|math|operator)[A-Za-z]++|[A-Za-z])"
)
_ARGUMENT = rf"-?(?:\d++(?:\.\d++)?|(?:{_WORD})++(?:\(-?\d++\)|\|(?:{_WORD})++)?)"
_ATOM = (
    rf"{_WORD}(?:_(?:\{{[^{{}}]*+\}}|\w))?(?:'|\^\{{?(?:-1|\\prime|\*)\}}?)*"
    rf"(?:[(\[]{_ARGUMENT}(?:,{_ARGUMENT})*[)\]])?"
)
_NAME = re.compile(rf"(?:\\?\||[(\[])?(?:{_ATOM})+(?:,(?:{_ATOM})+)*(?:\\?\||[)\]])?")


@dataclass(frozen=True)
class Member:
    """One member of a list of equations."""

    left: tuple[str, ...]
    """The sides before the last equals sign, one string per sign."""
    value: str

    @property
    def name(self) -> str | None:
        """The first left side if it is a name, else None."""
        return squeeze(self.left[0]) if self.left and is_name(self.left[0]) else None


def has_equation(answer: str) -> bool:
    """Whether the answer contains an equals sign or an arrow."""
    return _EQUALS.search(answer) is not None


def members(answer: str) -> list[Member]:
    """The members of a list, each split at its equals signs."""
    return [
        Member(tuple(left), value) for *left, value in ([s.strip() for s in _EQUALS.split(p)] for p in _parts(answer))
    ]


def named_members(answer: str) -> list[Member]:
    """Like `members`; in n = 1, 2, 3 all members get the name n, and (x, y) = (1, 2) becomes two members."""
    parts = members(answer)
    if len(parts) == 1 and (name := parts[0].name or "").startswith("(") and parts[0].value.startswith("("):
        names, values = name.strip("()").split(","), _parts(parts[0].value.removeprefix("(").removesuffix(")"))
        if len(names) == len(values) > 1:
            return [Member((name,), value.strip()) for name, value in zip(names, values, strict=True)]
    if len(parts) > 1 and parts[0].left and not any(member.left for member in parts[1:]):
        return [parts[0], *(Member(parts[0].left[:1], member.value) for member in parts[1:])]
    return parts


def is_name(side: str) -> bool:
    """Whether a side of an equation is a name: `x`, `x_1`, `f(2)`, `(x, y)`, `\\angle ABC`, or a product of letters."""
    return _NAME.fullmatch(squeeze(side)) is not None


def squeeze(side: str) -> str:
    """Remove white space and dollar signs; names are compared in this form."""
    return re.sub(r"\s+|\$", "", side)


def _parts(answer: str) -> list[str]:
    """The members of a list, split at commas, semicolons, "and" and "or" outside brackets."""
    parts, begin, depth, seen = [], 0, 0, 0
    for separator in _SEPARATOR.finditer(answer):
        gap = answer[seen : separator.start()]
        depth += sum(map(gap.count, "([{")) - sum(map(gap.count, ")]}"))
        seen = separator.end()
        if depth == 0:
            if answer[begin : separator.start()].strip():  # "2, and 3" has two members
                parts.append(answer[begin : separator.start()])
            begin = seen
    return [*parts, answer[begin:]]
