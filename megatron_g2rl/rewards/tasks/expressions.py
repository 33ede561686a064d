"""Canonical forms of expressions in +, - and *: equal for expressions that differ in order and brackets only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Form:
    """A number, a sum of signed terms, or a product of factors; terms and factors are sorted texts."""

    kind: Literal["number", "sum", "product"]
    parts: tuple[str, ...]
    is_one: bool = False
    """Whether its value is 1, so that it disappears as a factor."""

    def __str__(self) -> str:
        """`(+3-2)*5`: sums are in brackets, and each of their terms has a sign."""
        return f"({''.join(self.parts)})" if self.kind == "sum" else "*".join(self.parts)


def number(value: int) -> Form:
    """The form of a given number."""
    return Form("number", (str(value),), value == 1)


def join(left: Form, operator: str, right: Form, value: int) -> Form:
    """The form of `left operator right`.

    Nested sums and products are merged, a difference adds the negated terms, and a factor of value 1 is dropped.

    Args:
        left: the first operand.
        operator: `+`, `-` or `*`.
        right: the second operand.
        value: value of the result.
    """
    if operator == "*":
        if left.is_one or right.is_one:
            return right if left.is_one else left
        return Form("product", tuple(sorted(_factors(left) + _factors(right))), value == 1)
    added = _terms(right)
    if operator == "-":
        added = tuple(("-" if term[0] == "+" else "+") + term[1:] for term in added)
    return Form("sum", tuple(sorted(_terms(left) + added)), value == 1)


def _factors(form: Form) -> tuple[str, ...]:
    return form.parts if form.kind == "product" else (str(form),)


def _terms(form: Form) -> tuple[str, ...]:
    return form.parts if form.kind == "sum" else (f"+{form}",)
