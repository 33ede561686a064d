"""Units of measurement in an answer, as far as two answers with different units must not count as equal."""

from __future__ import annotations

import re

_NAMES = {
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "m": "m meter metre",
    "km": "km kilometer kilometre",
    "in": "in inch inche",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "mg": "mg milligram",
    "g": "g gram",
    "kg": "kg kilogram",
    "lb": "lb pound",
    "oz": "oz ounce",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "year yr",
    "ml": "ml milliliter millilitre",
    "l": "l liter litre",
    "cent": "cent",
    "dollar": "dollar usd",
    "euro": "euro eur",
    "degree": "degree deg",
    "radian": "radian rad",
    "am": "am",
    "pm": "pm",
}
_CANONICAL = {name: unit for unit, names in _NAMES.items() for name in names.split()}
_TEXT = re.compile(r"\\(?:text|textrm|textbf|mathrm|mbox|hbox)\s*\{([^{}]*)\}")
# Bare letters after a number are a unit only when there are two or more: 5m is five times m.
_BARE = re.compile(r"\d(?:\\[,;:])*([A-Za-z]{2,})$")
_SYMBOLS = {"\\$": "dollar", "^\\circ": "degree", "^{\\circ}": "degree", "°": "degree", "€": "euro"}


def units_of(answer: str) -> frozenset[str]:
    """Known units named in an answer, each under one name; words that are no known unit are not reported."""
    found = {unit for symbol, unit in _SYMBOLS.items() if symbol in answer}
    for words in (*_TEXT.findall(answer), *_BARE.findall(re.sub(r"\s+", "", answer))):
        for word in re.findall(r"[a-z]+", words.lower().replace(".", "")):
            unit = _CANONICAL.get(word) or _CANONICAL.get(word.removesuffix("s"))
            if unit:
                found.add(unit)
    return frozenset(found)
