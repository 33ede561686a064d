"""Evaluates a scalar at a point: a Fraction while everything is rational, otherwise an mpmath number.

Nothing is simplified or expanded, and work is counted, so that time is bounded for any answer. An evaluation records
the magnitudes it encounters: they determine how many digits a comparison needs (`equality.py`).
"""

from __future__ import annotations

import math
import random
from fractions import Fraction

from mpmath.ctx_mp import MPContext

from megatron_g2rl.rewards.answers.nodes import Node

MAX_BITS = 150_000
"""Maximum bits of numerator plus denominator; a larger power is treated as an unknown."""
MAX_WORK = 2e7
"""Maximum work per comparison, in units of 10 to 50 ns: a comparison takes at most about a second."""
MAX_INTEGER = 3_000
"""Maximum argument of a factorial or binomial coefficient that is computed."""
# A separate context: the precision of mpmath.mp belongs to the user.
_MP = MPContext()
GUARD_DIGITS = 40
SCALES = (1.0, 4.0, 0.4, 30.0, 1.5, 300.0, 0.1, 8.0, 0.8, 2.0, 0.6, 3.0)
_TRIGONOMETRIC = frozenset(["sin", "cos", "tan", "cot", "sec", "csc"])


class UndefinedError(ArithmeticError):
    """The value does not exist at this point or is not computed."""


class TooMuchWorkError(RuntimeError):
    """A comparison needs more than `MAX_WORK`."""


class Budget:
    """Remaining work of one comparison; with a time limit, results would depend on the machine's load."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Start a comparison."""
        self.left = MAX_WORK

    def spend(self, work: float) -> None:
        """Subtract work; raises TooMuchWorkError if none is left."""
        self.left -= work
        if self.left < 0:
            raise TooMuchWorkError("the comparison needs too much work")


BUDGET = Budget()
"""Budget of the running comparison; a process runs one at a time."""


class Point:
    """Random values of unknowns, drawn on first use; equal names have equal values."""

    def __init__(self, index: int) -> None:
        self._random = random.Random(index)
        self._scale = SCALES[index % len(SCALES)]
        self.values: dict[object, Fraction] = {}

    def value(self, name: object) -> Fraction:
        """Value of a symbol (a string, of either sign) or of a number too large to compute (positive)."""
        if name not in self.values:
            size = Fraction(self._random.randint(300, 3000), self._random.choice((997, 1009, 1013)))
            size *= Fraction(self._scale).limit_denominator(10)
            negative = isinstance(name, str) and self._random.random() < 0.5
            self.values[name] = -size if negative else size
        return self.values[name]


class Evaluation:
    """Evaluates trees at one point and precision; records the magnitudes that determine the needed digits."""

    def __init__(self, point: Point, digits: int = 60) -> None:
        self.point = point
        self.mp = _MP
        self.mp.dps = digits
        self.largest, self.smallest, self.bits = 0, 0, 0
        self._in_degrees = False

    def value(self, node: Node):
        """A Fraction if everything is rational, otherwise an mpmath number; raises UndefinedError."""
        if node[0] not in _EVALUATORS:
            raise UndefinedError(f"the value of a {node[0]}")
        try:
            value = _EVALUATORS[node[0]](self, *node[1:])
        except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
            raise UndefinedError(str(error)) from error
        if isinstance(value, Fraction):
            self._count(value)
        else:
            self._note(value)
        return value

    def digits_needed(self) -> int:
        """Digits that can cancel at the recorded magnitudes, plus a margin."""
        return GUARD_DIGITS + int(0.31 * (2 * self.bits + self.largest - self.smallest))

    def inexact(self, value):
        """Convert the value to an mpmath number."""
        if isinstance(value, Fraction):
            self.bits = max(self.bits, min(_bits(value), MAX_BITS))
            value = self.mp.mpf(value.numerator) / value.denominator
            self._note(value)
        return value

    def _count(self, value: Fraction) -> None:
        bits = _bits(value)
        BUDGET.spend(10 + (bits / 64) ** 2)
        if bits > MAX_BITS:
            raise UndefinedError("too large to compute")

    def _note(self, value) -> None:
        BUDGET.spend(100 + self.mp.dps**2 / 10)
        if not self.mp.isfinite(value):
            raise UndefinedError("not finite")
        if value != 0:
            size = int(self.mp.mag(value))
            self.largest, self.smallest = max(self.largest, size), min(self.smallest, size)

    def _reduce(self, operation, nodes):
        total = self.value(nodes[0])
        for node in nodes[1:]:
            value = self.value(node)
            if isinstance(total, Fraction) and isinstance(value, Fraction):
                total = operation(total, value)
                self._count(total)
            else:
                total = operation(self.inexact(total), self.inexact(value))
                self._note(total)
        return total

    def _add(self, *nodes):
        return self._reduce(lambda a, b: a + b, nodes)

    def _multiply(self, *nodes):
        return self._reduce(lambda a, b: a * b, nodes)

    def _divide(self, over, under):
        return self._reduce(lambda a, b: a / b, (over, under))

    def _constant(self, name):
        if name == "inf":
            raise UndefinedError("infinite")
        return {"pi": +self.mp.pi, "e": +self.mp.e, "i": self.mp.j}[name]

    def _degrees(self, node):
        value = self.value(node)
        return self.inexact(value) * self.mp.pi / 180 if self._in_degrees else value

    def _power(self, base_node, exponent_node):
        return self._raise_node(base_node, self.value(exponent_node))

    def _root(self, node, degree_node):
        degree = self.value(degree_node)
        if not isinstance(degree, Fraction) or degree.denominator != 1 or degree < 2:
            raise UndefinedError("a root of non-integer degree")
        return self._raise_node(node, 1 / degree)

    def _raise_node(self, node, exponent):
        """Combine the exponents of a power of a power of a positive rational, so that the inner one is not computed."""
        if node[0] == "pow" and isinstance(exponent, Fraction):
            base, inner = self.value(node[1]), self.value(node[2])
            if isinstance(base, Fraction) and isinstance(inner, Fraction) and base > 0:
                return self._raise(base, inner * exponent)
            return self._raise(self._raise(base, inner), exponent)
        return self._raise(self.value(node), exponent)

    def _raise(self, base, exponent):
        if base == 0:
            if exponent == 0 or self.mp.re(self.inexact(exponent)) <= 0:
                raise UndefinedError("a power of 0")
            return Fraction(0)
        if isinstance(exponent, Fraction):
            if isinstance(base, Fraction):
                return self._raise_rational(base, exponent)
            if exponent.denominator % 2 and exponent.denominator > 1 and _is_negative(self.mp, base):
                return self._odd_root(base, exponent)
        return self._raise_inexact(base, exponent)

    def _raise_rational(self, base: Fraction, exponent: Fraction):
        if exponent.denominator == 1:
            if abs(base) == 1:
                return base if exponent.numerator % 2 else Fraction(1)
            if _bits(base) * abs(exponent) > MAX_BITS:
                return self.point.value(("pow", base, exponent))
            return base ** int(exponent)
        if base < 0 and exponent.denominator % 2:
            return self._odd_root(base, exponent)
        root = _exact_root(base, exponent.denominator) if exponent.denominator <= 12 else None
        if root is not None:
            return self._raise_rational(root, Fraction(exponent.numerator))
        return self._raise_inexact(base, exponent)

    def _odd_root(self, base, exponent: Fraction):
        """The real root of a negative number, such as (-8)^(1/3)."""
        value = self._raise(-base, exponent)
        return -value if exponent.numerator % 2 else value

    def _raise_inexact(self, base, exponent):
        base, exponent = self.inexact(base), self.inexact(exponent)
        size = self.mp.mag(exponent)
        if size > 23 or max(abs(self.mp.mag(base)), 1) * 2 ** max(size, 0) > 1e7:
            raise UndefinedError("a power too large to compute")
        return self.mp.power(base, exponent)

    def _factorial(self, node):
        value = self.value(node)
        if isinstance(value, Fraction) and value.denominator == 1 and value >= 0:
            if value <= MAX_INTEGER:
                return Fraction(math.factorial(int(value)))
            return self.point.value(("fact", value))
        return self.mp.gamma(self._moderate(self.inexact(value)) + 1)

    def _binomial(self, over, under):
        n, k = self.value(over), self.value(under)
        if all(isinstance(value, Fraction) and value.denominator == 1 for value in (n, k)):
            if n < 0 or k < 0:
                raise UndefinedError("a binomial coefficient of negative numbers")
            if k > n:
                return Fraction(0)
            if n <= MAX_INTEGER:
                return Fraction(math.comb(int(n), int(k)))
            return self.point.value(("binom", n, min(k, n - k)))
        return self.mp.binomial(self._moderate(self.inexact(n)), self._moderate(self.inexact(k)))

    def _moderate(self, value):
        if self.mp.mag(value) > 6:
            raise UndefinedError("too large to compute")
        BUDGET.spend(15 * self.mp.dps**2)  # the gamma function is the slowest
        return value

    def _function(self, name, *nodes):
        outer, self._in_degrees = self._in_degrees, name in _TRIGONOMETRIC
        try:
            values = [self.value(node) for node in nodes]
        finally:
            self._in_degrees = outer
        if all(isinstance(value, Fraction) for value in values):
            exact = _exact_function(name, values)
            if exact is not None:
                return exact
        mp, x = self.mp, self.inexact(values[0])
        if name in ("floor", "ceil"):
            return self._round(name, x)
        if name == "log":
            over, under = mp.ln(x), mp.ln(self.inexact(values[1]))
            self._note(under)
            return over / under
        if self.mp.mag(x) > (2000 if name in ("ln", "abs", *_TRIGONOMETRIC) else 20):
            raise UndefinedError("too large to compute")
        return getattr(mp, _MPMATH.get(name, name))(x)

    def _round(self, name, x):
        if self.mp.im(x) != 0 or self.mp.mag(x) > 0.8 * self.mp.prec:
            raise UndefinedError("the integer part of a complex or too large number")
        x = self.mp.re(x)
        near = self.mp.nint(x)
        if abs(x - near) < self.mp.mpf(10) ** (20 - self.mp.dps):
            return Fraction(int(near))
        return Fraction(int(self.mp.floor(x) if name == "floor" else self.mp.ceil(x)))


_EVALUATORS = {
    "num": lambda self, value, *_: value, "sym": lambda self, name: self.point.value(name),
    "const": Evaluation._constant, "add": Evaluation._add, "mul": Evaluation._multiply, "div": Evaluation._divide,
    "neg": lambda self, node: -self.value(node), "pow": Evaluation._power, "root": Evaluation._root,
    "fn": Evaluation._function, "fact": Evaluation._factorial, "binom": Evaluation._binomial,
    "deg": Evaluation._degrees, "pct": lambda self, node: self.value(node) / 100,
}  # fmt: skip
_MPMATH = {
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot", "arcsec": "asec", "arccsc": "acsc",
    "arsinh": "asinh", "arcosh": "acosh", "artanh": "atanh", "Re": "re", "Im": "im", "abs": "fabs",
}  # fmt: skip


def _bits(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _is_negative(mp: MPContext, value) -> bool:
    return mp.im(value) == 0 and mp.re(value) < 0


def _exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The rational root of a positive rational, or None if it is irrational."""
    if value < 0:
        return None
    roots = []
    for part in (value.numerator, value.denominator):
        root = math.isqrt(part) if degree == 2 else _integer_root(part, degree)
        if root**degree != part:
            return None
        roots.append(root)
    return Fraction(*roots)


def _integer_root(value: int, degree: int) -> int:
    root = 1 << -(-value.bit_length() // degree)
    while True:  # Newton's method, from above
        smaller = ((degree - 1) * root + value // root ** (degree - 1)) // degree
        if smaller >= root:
            return root
        root = smaller


def _exact_function(name: str, values: list[Fraction]) -> Fraction | None:
    """Exact value of functions that map rationals to rationals; None for other functions."""
    if name in ("max", "min"):
        return max(values) if name == "max" else min(values)
    if name in ("gcd", "lcm"):
        if any(value.denominator != 1 for value in values):
            raise UndefinedError(name)
        return Fraction((math.gcd if name == "gcd" else math.lcm)(*map(int, values)))
    x = values[0]
    if name in ("abs", "floor", "ceil"):
        return abs(x) if name == "abs" else Fraction(math.floor(x) if name == "floor" else math.ceil(x))
    if name in ("Re", "Im"):
        return x if name == "Re" else Fraction(0)
    return None
