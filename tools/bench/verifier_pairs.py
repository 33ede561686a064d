"""Pairs of answers that are equal by construction or differ by one small change, for testing any verifier.

Every pair starts from exact values (fractions of any size); the spellings of a value are exact. Nothing here uses the
code under test. Used by tests/unit/test_verifier_pairs.py and tools/bench/compare_verifiers.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from random import Random


@dataclass(frozen=True)
class Pair:
    """A reference, an answer, and whether the answer is correct."""

    kind: str
    gold: str
    found: str
    equal: bool


_SIZES = [(9, 9), (99, 99), (9999, 999), (10**9, 10**6), (10**20, 10**20), (10**60, 10**60)]


def _rational(random: Random, positive: bool = False) -> Fraction:
    numerator, denominator = random.choice(_SIZES)
    form = random.choice(["any", "any", "integer", "decimal", "power"])
    value = Fraction(random.randint(1, numerator))
    if form == "any":
        value /= random.randint(1, denominator)
    elif form == "decimal":
        value /= 10 ** random.randint(1, 25)
    elif form == "power":
        value /= random.choice([2, 3, 5, 7, 10]) ** random.randint(1, 120)
    return value if positive or random.choice([True, False]) else -value


def _different_rationals(random: Random, number: int) -> list[Fraction]:
    values: dict[Fraction, None] = {}
    while len(values) < number:
        values[_rational(random)] = None
    return list(values)


def _decimal(value: Fraction) -> str | None:
    """The value as a finite decimal; None if it has none."""
    denominator, places = value.denominator, 0
    while denominator % 10 == 0:
        denominator, places = denominator // 10, places + 1
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator, places = denominator // prime, places + 1
    if denominator != 1:
        return None
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    text = f"{digits[: len(digits) - places]}.{digits[len(digits) - places :]}" if places else digits
    return ("-" if value < 0 else "") + text


def _scientific(random: Random, value: Fraction) -> str | None:
    exponent = random.randint(-40, 40)
    mantissa = _decimal(value / Fraction(10) ** exponent)
    if mantissa is None or len(mantissa) > 60:
        return None
    forms = [rf"{mantissa}\times10^{{{exponent}}}", rf"{mantissa} \cdot 10^{{{exponent}}}", f"{mantissa}e{exponent:+d}"]
    # An integer before e and a small exponent could be a multiple of Euler's number.
    return random.choice(forms if "." in mantissa else forms[:2])


def _mixed(random: Random, value: Fraction) -> str | None:
    whole, rest = divmod(abs(value), 1)
    if not whole or not rest:
        return None
    sign = "-" if value < 0 else ""
    p, q = rest.numerator, rest.denominator
    return sign + random.choice([f"{whole} {p}/{q}", rf"{whole}\frac{{{p}}}{{{q}}}", rf"{whole} \frac{{{p}}}{{{q}}}"])


def _fraction(random: Random, value: Fraction) -> str:
    factor = random.choice([1, 1, 2, 3, 7, 10, 997])
    sign, p, q = "-" if value < 0 else "", abs(value.numerator) * factor, value.denominator * factor
    return sign + random.choice(
        [rf"\frac{{{p}}}{{{q}}}", f"{p}/{q}", rf"\dfrac{{{p}}}{{{q}}}", rf"\frac{{ {p} }}{{ {q} }}"]
    )


def _arithmetic(random: Random, value: Fraction) -> str:
    other = _rational(random)
    rest = value - other
    sign = "-" if rest < 0 else "+"
    return rf"{_fraction(random, other)} {sign} \frac{{{abs(rest.numerator)}}}{{{rest.denominator}}}"


def _root(random: Random, value: Fraction) -> str | None:
    if value < 0:
        return None
    p, q = value.numerator**2, value.denominator**2
    return random.choice([rf"\sqrt{{\frac{{{p}}}{{{q}}}}}", f"sqrt({p}/{q})", rf"\sqrt{{{p}}}/\sqrt{{{q}}}"])


def _spelled(random: Random, value: Fraction) -> str:
    """One of the ways to write a rational exactly."""
    writers = [_fraction, _mixed, _scientific, _arithmetic, _root, lambda _, v: _decimal(v), _grouped, _percent]
    text = random.choice(writers)(random, value)
    return text if text is not None else _fraction(random, value)


def _grouped(_, value: Fraction) -> str | None:
    return f"{value.numerator:,}" if value.denominator == 1 else None


def _percent(_, value: Fraction) -> str | None:
    text = _decimal(value * 100)
    return None if text is None else text + "\\%"


def _plain(random: Random, value: Fraction) -> str:
    """A spelling that is allowed inside a list."""
    writers = [_fraction, _mixed, _arithmetic, lambda _, v: _decimal(v)]
    text = random.choice(writers)(random, value)
    return text if text is not None else _fraction(random, value)


def _changed(random: Random, value: Fraction) -> Fraction:
    """A different but similar value."""
    p, q = value.numerator, value.denominator
    step = Fraction(1, 10 ** random.randint(0, 80))
    changes = [Fraction(p + 1, q), Fraction(p - 1, q), Fraction(p, q + 1), -value, value * 10, value / 2, value + step]
    changes += [Fraction(q, p) if p else Fraction(1), value * (1 + step), 2 * value, value + 1]
    other = random.choice(changes)
    return other if other != value else value + 1


def _wrapped(random: Random, text: str) -> str:
    """The answer in another layout."""
    layouts = [
        "{}", "{}", "{}", "${}$", "\\({}\\)", "{}.", " {} ", "{{{}}}", "**{}**", "`{}`", "\\displaystyle {}", "$${}$$",
        "\\textbf{{{}}}", "\\,{}\\,", "__{}__",
    ]  # fmt: skip
    layout = random.choice(layouts)
    if "textbf" in layout and "{" in text or layout in ("__{}__", "{}.") and "_" in text:
        layout = "{}"
    text = text.replace("-", random.choice(["-", "-", "−"])) if "e-" not in text else text
    return layout.format(text)


def _number_pair(random: Random) -> Pair:
    value, equal = _rational(random), random.choice([True, False])
    other = value if equal else _changed(random, value)
    # A percent sign may count as a unit that the reference omits, so do not change the value by a factor of 100.
    if not equal and other in (value * 100, value / 100):
        other = value + 1
    gold, found = _spelled(random, value), _spelled(random, other)
    if "%" in gold + found and not equal:
        gold, found = _plain(random, value), _plain(random, other)
    return Pair("number", gold, found, equal)


def _radical_pair(random: Random) -> Pair:
    a, b = random.randint(1, 10 ** random.randint(1, 12)), random.randint(2, 10 ** random.randint(1, 6))
    c, equal = random.randint(1, 50), random.choice([True, False])
    d = a if equal else a + random.choice([1, 2, a])
    gold, found = random.choice(
        [
            (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{d * d * b}}}"),
            (rf"{a}\sqrt{{{b}}}", rf"{d}\sqrt({b})"),
            (rf"\frac{{{a}}}{{\sqrt{{{b}}}}}", rf"\frac{{{d}\sqrt{{{b}}}}}{{{b}}}"),
            (rf"\frac{{{a}}}{{\sqrt{{{b}}}}}", rf"{d} \cdot \sqrt{{\frac{{1}}{{{b}}}}}"),
            (rf"{c} + {a}\sqrt{{{b}}}", rf"\sqrt{{{c * c + d * d * b} + {2 * c * d}\sqrt{{{b}}}}}"),
            (rf"\sqrt[3]{{{a**3 * b}}}", rf"{d}\sqrt[3]{{{b}}}"),
            (rf"\frac{{1}}{{{c} + {a}\sqrt{{{b}}}}}", rf"\frac{{{d}\sqrt{{{b}}} - {c}}}{{{d * d * b - c * c}}}"),
            (rf"{a}\sqrt{{{b}}}", rf"{d} \cdot {b}^{{1/2}}"),
            (rf"\frac{{\sqrt{{{b}}}}}{{{a}}}", rf"\sqrt{{\frac{{{b}}}{{{d * d}}}}}"),
        ]
    )
    if d * d * b == c * c:
        gold, found = rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{d * d * b}}}"
    return Pair("radical", gold, found, equal)


def _collection_pair(random: Random) -> Pair:
    values = _different_rationals(random, random.randint(2, 5))
    form = random.choice(["list", "set", "tuple"])
    change = random.choice(["none", "none", "member", "missing", "order"])
    others = list(values)
    equal = change == "none" or change == "order" and form != "tuple"
    if change == "member":
        index = random.randint(0, len(values) - 1)
        others[index] = _changed(random, values[index])
        equal = False
        if others[index] in values:
            others[index] = sum(map(abs, values)) + 1
    elif change == "missing":
        others, equal = others[:-1], False
    elif change == "order":
        others = others[1:] + others[:1]
    opening, closing = {"list": ("", ""), "set": (r"\{", r"\}"), "tuple": ("(", ")")}[form]
    gold, found = (", ".join(_plain(random, value) for value in side) for side in (values, others))
    if form == "list" and random.choice([True, False]):
        found = found.replace(", ", r" \text{ and } ")
    return Pair(form, opening + gold + closing, opening + found + closing, equal)


def _interval_pair(random: Random) -> Pair:
    low, high = sorted(_different_rationals(random, 2))
    left, right = random.choice("[("), random.choice("])")
    change = random.choice(["none", "none", "none", "left", "right", "low", "high"])
    other_left = "[(".replace(left, "") if change == "left" else left
    other_right = "])".replace(right, "") if change == "right" else right
    other_low = low - (high - low) / 10**20 if change == "low" else low
    other_high = high + (high - low) / 10**20 if change == "high" else high
    gold = f"{left}{_plain(random, low)}, {_plain(random, high)}{right}"
    a, b = _plain(random, other_low), _plain(random, other_high)
    relations = r"\le" if other_left == "[" else "<", r"\le" if other_right == "]" else "<"
    found = random.choice(
        [
            f"{other_left}{a}, {b}{other_right}",
            rf"\left{other_left} {a}, {b} \right{other_right}",
            f"{a} {relations[0]} x {relations[1]} {b}",
            rf"x \in {other_left}{a},{b}{other_right}",
        ]
    )
    return Pair("interval", gold, found, change == "none")


_UNITS = [
    [(r"\text{ km}", 100_000), (r"\text{ m}", 100), (" cm", 1), (" meters", 100), (r"\text{ mm}", Fraction(1, 10))],
    [(" hours", 3600), (" minutes", 60), (r"\text{ seconds}", 1)],
    [(r"\text{ dollars}", 100), (" cents", 1), (" dollars", 100)],
    [(r"\text{ kg}", 1000), (r"\text{ grams}", 1), (" kilograms", 1000)],
]


def _unit_pair(random: Random) -> Pair:
    value, equal = _rational(random, positive=True), random.choice([True, False])
    units = random.choice(_UNITS)
    (gold_unit, gold_size), (found_unit, found_size) = random.choice(units), random.choice(units)
    other = value * gold_size / found_size
    form = random.choice(["both", "left out", "no unit in the reference"])
    if form != "both":
        other = value
        gold_unit, found_unit = (gold_unit, "") if form == "left out" else ("", found_unit)
    other = other if equal else _changed(random, other)
    return Pair("unit", _plain(random, value) + gold_unit, _plain(random, other) + found_unit, equal)


def _formula_pair(random: Random) -> Pair:
    a, b = random.randint(-(10**6), 10**6), random.randint(1, 10**6)
    n, equal = random.randint(2, 9), random.choice([True, False])
    c = b if equal else b + random.choice([1, -1, 1000])
    name, other = random.choice([("x", "x"), ("t", "t"), ("n", "n"), ("\\theta", "\\theta")])
    templates = [
        ("(X+{a})(X-{b})", "X^2 + ({a}-{c})X - {a}\\cdot{c}"),
        ("\\frac{{{a}}}{{X}} + {b}", "\\frac{{{a}+{c}X}}{{X}}"),
        ("(X+{b})^{n}", "(X+{c})^{{{n}}}"),
        ("{b}\\sin^2 X", "{c} - {c}\\cos^2 X"),
        ("{b}\\sin(2X)", "2\\cdot{c}\\sin X\\cos X"),
        ("{b}\\cos(2X)", "{c}(1-2\\sin^2(X))"),
        ("\\frac{{{b}}}{{\\sqrt X}}", "{c}\\sqrt{{1/X}}"),
        ("{b}^{{X+1}}", "{b}\\cdot{c}^X"),
        ("\\ln({b}X)", "\\ln {c} + \\ln X"),
        ("e^{{{n}X}}+{b}", "(e^X)^{n}+{c}"),
    ]
    gold, found = random.choice(templates)
    gold, found = (side.format(a=f"({a})", b=b, c=c if c > 0 else b + 1, n=n) for side in (gold, found))
    return Pair("formula", gold.replace("X", f"{name} "), found.replace("X", f"{other} "), equal)


def draw_pair(random: Random) -> Pair:
    """A pair of any kind, with the answer in some layout; each random choice is one call of `random`."""
    kinds = [_number_pair, _number_pair, _radical_pair, _collection_pair, _interval_pair, _unit_pair, _formula_pair]
    pair = random.choice(kinds)(random)
    return Pair(pair.kind, pair.gold, _wrapped(random, pair.found), pair.equal)
