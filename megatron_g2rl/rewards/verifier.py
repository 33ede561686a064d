"""Judges one mathematical answer: last \\boxed{...} of the response against the reference, by math-verify.

math-verify decides equality of mathematics; this file decides what is put before it and what is refused first
(docs/rewards.md lists every decision). It never watches the clock: some answers compute for ever, inside C code that no
signal handler interrupts. `RewardPool` runs it in processes that can be killed.
"""

from __future__ import annotations

import logging
import re
import sys
from functools import lru_cache

from megatron_g2rl.rewards.boxed import last_boxed
from megatron_g2rl.rewards.units import units_of

MAX_ANSWER_CHARS = 20_000
"""A longer final answer is wrong without being read."""
MAX_NESTING = 60
"""An answer with deeper brackets is wrong without being parsed: the parser's time grows exponentially with depth."""

# Full-width ASCII (U+FF01..U+FF5E) and the ideographic space. Not NFKC, which would turn a superscript 2 into a 2.
_HALF_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
_BRACED = re.compile(r"\{((?:\\.|[^{}\\]|\{(?:\\.|[^{}\\])*\})*)\}", re.DOTALL)
_LETTER_LIST = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{\s*([A-Z](?:\s*,\s*[A-Z])+)\s*\}")
_PYTHON_POWER = re.compile(r"\*\*\s*(-?\d+(?:\.\d+)?|[A-Za-z])")
_HUGE_POWER = re.compile(r"(?<![\w.\\}])(1\d+|[2-9]\d*)\^(?:\{(\d{8,})\}|(\d{8,}))")
_NUMBER_IN_BASE = re.compile(r"^\(?(\d[0-9A-Za-z]*)\)?_(?:\{(?:\\text\{)?(\d+)\}?\}|(\d))$")
_EQUALS = re.compile(
    r"(?<![<>!\\])(?::=|=)|\\(?:equiv|approx|simeq|cong|doteq|to|implies|iff|(?:long)?(?:left)?rightarrow|Rightarrow"
    r"|Leftrightarrow|Longrightarrow|Longleftrightarrow)(?![A-Za-z])|[≈≡→⇒⇔]"
)
_SEPARATOR = re.compile(r",(?!\d{3}(?!\d)|\\!)|;|\\(?:text|mathrm)\s*\{\s*(?:or|and)\s*\}|\\(?:quad|qquad)(?![A-Za-z])")
# A name: letters and commands without an operator; subscripts, primes, ^{-1} and plain arguments may follow.
_WORD = (
    r"(?:\\(?:text|mathrm|mathbf|mathit|mathcal|operatorname|overline|vec|hat|bar)\{[A-Za-z .']*+\}"
    r"|\\(?!frac|dfrac|tfrac|cdot|times|div|sqrt|sum|prod|int|binom|pm|mp|text|math|operator)[A-Za-z]++|[A-Za-z])"
)
_ARGUMENT = rf"-?(?:\d++(?:\.\d++)?|(?:{_WORD})++)"
_ATOM = (
    rf"{_WORD}(?:_(?:\{{[^{{}}]*+\}}|\w))?(?:'|\^\{{?(?:-1|\\prime)\}}?)*"
    rf"(?:\({_ARGUMENT}(?:,{_ARGUMENT})*\))?"
)
_NAME = re.compile(rf"(?:\\?\||[(\[])?(?:{_ATOM})+(?:,(?:{_ATOM})+)*(?:\\?\||[)\]])?")


def verify_math(completion: str, answer: str) -> float:
    """Whether a response's final answer is the reference answer: 1.0 correct, 0.0 wrong.

    Args:
        completion: the whole response; its last \\boxed{...} (after `</think>`) is the answer, no box is wrong.
        answer: the reference: LaTeX or plain, without the box. An empty one matches nothing.

    It has no time limit of its own: judge what a model wrote through `RewardPool`. What cannot be parsed is wrong.
    """
    found = last_boxed(completion)
    if found is None or len(found) > MAX_ANSWER_CHARS:
        return 0.0
    gold, found = _clean(answer), _clean(found)
    if not gold or not found or _nesting(found) > MAX_NESTING:
        return 0.0
    return float(_same_answer(gold, found))


def math_reward(response_text: str, answer: str) -> float:
    """Base reward of a verifiable task: +1.0 for a right final answer, -1.0 for a wrong one (METHOD 3)."""
    return 1.0 if verify_math(response_text, answer) == 1.0 else -1.0


@lru_cache(maxsize=1024)
def _same_answer(gold: str, found: str) -> bool:
    """Cached: the responses of a group often end in the same answer."""
    gold_is_equation = _EQUALS.search(gold) is not None
    if not gold_is_equation:
        found = _without_names(found)
    if _squeeze(gold) == _squeeze(found):
        return True
    gold_units, found_units = units_of(gold), units_of(found)
    if gold_units and found_units and gold_units != found_units:
        return False
    in_base = _compare_in_base(gold, found)
    if in_base is not None:
        return in_base
    # Python refuses integer literals above 4300 digits by default; the length of the answer is bounded above.
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(MAX_ANSWER_CHARS + 10)
    try:
        return _equal(gold, found) and (gold_is_equation or _equations_hold(found))
    except MemoryError:
        raise
    except Exception as error:
        logging.getLogger(__name__).debug("math-verify could not judge %.100r against %.100r: %s", found, gold, error)
        return False
    finally:
        sys.set_int_max_str_digits(digits)


def _equal(gold: str, found: str) -> bool:
    """math-verify's verdict; its own timers are off, they need signals and miss what hangs in C."""
    from math_verify import LatexExtractionConfig, parse, verify

    # The box and nothing else: by default a box that does not parse is searched for any number at its end.
    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    # It warns on the error stream, once per process, that its timers are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    parsed = [
        parse(f"\\boxed{{{side}}}", config, extraction_mode="first_match", parsing_timeout=None)
        for side in (gold, found)
    ]
    return verify(*parsed, allow_set_relation_comp=True, timeout_seconds=None)


def _clean(answer: str) -> str:
    """The same answer without what changes only its looks."""
    answer = answer.translate(_HALF_WIDTH).strip()
    if answer.startswith("$") and answer.endswith("$"):
        answer = answer.strip("$")
    if braced := _BRACED.fullmatch(answer):
        answer = braced[1].strip()
    # Full stops, commas and TeX spacing at the end; a backslash there belongs to one of these.
    answer = answer.rstrip(" \t\n.,;:\\")
    answer = _LETTER_LIST.sub(r"\1", answer)
    answer = _PYTHON_POWER.sub(r"^{\1}", answer).replace("**", "^")
    # A number with ten million digits or more is an unknown of its own: equal to itself, never computed.
    return _HUGE_POWER.sub(lambda power: rf"\zeta_{{{power[1]}p{power[2] or power[3]}}}", answer)


def _squeeze(answer: str) -> str:
    return re.sub(r"\s+", "", answer)


def _nesting(answer: str) -> int:
    depth = deepest = 0
    for character in answer:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def _compare_in_base(gold: str, found: str) -> bool | None:
    """Compare when either side is a number written in a base (math-verify drops the base); None when neither is."""
    gold_number, found_number = (_NUMBER_IN_BASE.match(_squeeze(side)) for side in (gold, found))
    if gold_number is None and found_number is None:
        return None
    sides = []
    for side, number in ((gold, gold_number), (found, found_number)):
        digits, base = (number[1], int(number[2] or number[3])) if number else (_squeeze(side), 10)
        if not (2 <= base <= 36 and digits.isalnum() and digits.isascii()):
            return False
        sides.append((digits.upper().lstrip("0"), base))
    return sides[0] == sides[1]


def _equations_hold(found: str) -> bool:
    """Whether every equation in an answer names its value (x = 5) or is true (2 + 3 = 5).

    math-verify takes the right side of any equation, so that "x^2 - 4x = 0" would earn every problem whose answer is 0.
    """
    for part in _parts(found):
        *left, value = _EQUALS.split(part)
        if not all(_NAME.fullmatch(_squeeze_layout(side)) or _equal(value, side) for side in left):
            return False
    return True


def _without_names(found: str) -> str:
    """`5` for `x = 5` or `f(2) = x = 5`; lists are left as they are."""
    if len(_parts(found)) == 1:
        *left, value = _EQUALS.split(found)
        if all(_NAME.fullmatch(_squeeze_layout(side)) for side in left):
            return value.strip()
    return found


def _parts(answer: str) -> list[str]:
    """The members of a list, cut at commas, semicolons, "and" and "or" that stand outside brackets."""
    parts, begin, depth, seen = [], 0, 0, 0
    for separator in _SEPARATOR.finditer(answer):
        gap = answer[seen : separator.start()]
        depth += sum(map(gap.count, "([{")) - sum(map(gap.count, ")]}"))
        seen = separator.end()
        if depth == 0:
            parts.append(answer[begin : separator.start()])
            begin = seen
    return [*parts, answer[begin:]]


def _squeeze_layout(side: str) -> str:
    """Without white space, TeX spacing and \\left, \\right."""
    return re.sub(r"\s+|\\(?:left|right)(?![A-Za-z])|\\[,!;: ]|\$", "", side)
