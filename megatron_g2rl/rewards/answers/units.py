"""Units of measurement: their dimensions and exact sizes, so that 1 m is 100 cm and 5 cm is not 5 m."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction

# dimension: {size in the dimension's first unit: names}
_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "1": "m meter metre", "1/1000": "mm millimeter millimetre", "1/100": "cm centimeter centimetre",
        "1/10": "dm decimeter decimetre", "1000": "km kilometer kilometre", "1/1000000": "micrometer micron",
        "1/1000000000": "nm nanometer", "127/5000": "in inch inche", "381/1250": "ft foot feet",
        "1143/1250": "yd yard", "201168/125": "mi mile",
    },
    "mass": {
        "1": "g gram gramme", "1/1000": "mg milligram", "1000": "kg kilogram kilo", "1000000": "tonne",
        "45359237/100000": "lb pound", "45359237/1600000": "oz ounce", "907184740/1000": "ton",
    },
    "time": {
        "1": "s sec second", "1/1000": "ms millisecond", "60": "min minute", "3600": "h hr hour", "86400": "day",
        "604800": "week",
    },
    "month": {"1": "month", "12": "year yr"},
    "money": {"1": "dollar usd buck $", "1/100": "cent penny pennie"},
    "euro": {"1": "euro eur €"}, "sterling": {"1": "gbp £"}, "yen": {"1": "yen yuan ¥"}, "rupee": {"1": "rupee"},
    "volume": {
        "1": "l liter litre", "1/1000": "ml milliliter millilitre", "473176473/125000000": "gallon",
        "473176473/500000000": "quart", "473176473/1000000000": "pint", "473176473/2000000000": "cup",
    },
    "angle": {"1": "degree"}, "radian": {"1": "radian rad"},
    "celsius": {"1": "celsius"}, "fahrenheit": {"1": "fahrenheit"}, "kelvin": {"1": "kelvin k"},
    "am": {"1": "am"}, "pm": {"1": "pm"},
    "force": {"1": "newton n"}, "energy": {"1": "joule j", "1000": "kj kilojoule"},
    "power": {"1": "watt w", "1000": "kw kilowatt"}, "voltage": {"1": "volt v"}, "current": {"1": "amp ampere"},
    "frequency": {"1": "hz hertz", "1000": "khz", "1000000": "mhz"},
    "pressure": {"1": "pa pascal", "1000": "kpa"}, "amount": {"1": "mol mole"},
}  # fmt: skip
_UNITS = {
    name: (dimension, Fraction(size))
    for dimension, sizes in _TABLE.items()
    for size, names in sizes.items()
    for name in names.split()
}
_COMPOSED = {"mph": ("mi", "h"), "kph": ("km", "h"), "kmh": ("km", "h")}
MULTIPLES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
}  # fmt: skip
# Words that change a value: an answer that contains one, other than as a unit, does not equal its number.
_MEANINGFUL = frozenset(
    "half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths"
    " ninth ninths tenth tenths hundredth hundredths thousandth thousandths squared cubed factorial times plus minus"
    " over divided by of more less than not mod modulo to from percent root power negative positive except wrong"
    " between least most about approximately around nearly almost up down or and but also if when where is are was"
    " either maybe both zero one two three four five six seven eight nine ten twenty pair pairs base binary twice"
    " double triple same greater fewer larger smaller equal equals inverse reciprocal is are isn't no none remainder"
    " january february march april may june july august september october november december".split()
)
_SHORTENED = {"deg": "degree", "sq": "square", "hrs": "hr", "secs": "sec", "mins": "min", "lbs": "lb", "yrs": "yr"}


@dataclass(frozen=True)
class Units:
    """Dimensions with their exponents and the exact size of the unit; without dimensions: no unit."""

    dimensions: dict[str, int] = field(default_factory=dict)
    size: Fraction = Fraction(1)
    multiple: int = 1
    """Factor of the value, such as 1000000 for 3 million."""

    def __hash__(self) -> int:
        return hash((frozenset(self.dimensions.items()), self.size, self.multiple))

    def times(self, other: Units, power: int = 1) -> Units:
        """Multiply by a power of other units."""
        dimensions = dict(self.dimensions)
        for dimension, exponent in other.dimensions.items():
            dimensions[dimension] = dimensions.get(dimension, 0) + power * exponent
        dimensions = {dimension: exponent for dimension, exponent in dimensions.items() if exponent}
        return Units(dimensions, self.size * other.size**power, self.multiple * other.multiple)


NO_UNITS = Units()


def unit_named(word: str) -> Units | None:
    """The unit with this name, singular or plural, in any case; None if there is none."""
    # Single letters are case-sensitive: M is not the meter.
    name = word if len(word) == 1 and word not in "LKNJWV" else word.lower().replace(".", "")
    name = _SHORTENED.get(name, name)
    if name in _COMPOSED:
        over, under = (unit_named(part) for part in _COMPOSED[name])
        return over.times(under, -1)
    for candidate in (name, name[:-1] if name.endswith("s") and len(name) > 2 else name):
        if candidate in _UNITS:
            dimension, size = _UNITS[candidate]
            if dimension == "volume":
                return Units({"length": 3}, size / 1000)
            return Units({dimension: 1}, size)
    return None


def read_units(words: list[str]) -> Units | None:
    r"""Units of the words after a number, with `/`, `per` and `^n`; None if the words change the value.

    Words that are neither units nor change the value (apples) are ignored.
    """
    units, sign, power = NO_UNITS, 1, 1
    pending: Units | None = None
    for word in words:
        lower = word.lower()
        if lower in ("/", "per", "an", "a", "each"):
            units = units.times(pending, sign * power) if pending else units
            pending, power = None, 1
            sign = -1 if lower in ("/", "per") or pending is None and sign == -1 else 1
        elif lower in ("square", "sq", "cubic", "cu"):
            units = units.times(pending, sign * power) if pending else units
            pending, power = None, 3 if lower.startswith("cu") else 2
        elif re.fullmatch(r"\^-?\d", word):
            if pending is None:
                continue
            power *= int(word[1:])
        elif lower in ("squared", "cubed") and pending is not None:
            power *= 3 if lower == "cubed" else 2
        elif lower in MULTIPLES:
            if units.dimensions or pending:
                return None
            units = Units(multiple=units.multiple * MULTIPLES[lower])
        elif (unit := unit_named(word)) is not None:
            if pending:
                units, power = units.times(pending, sign * power), 1
            pending = unit
        elif lower in _MEANINGFUL or lower.removesuffix("s") in MULTIPLES:
            return None
        elif pending:
            units, pending, power = units.times(pending, sign * power), None, 1
    return units.times(pending, sign * power) if pending else units
