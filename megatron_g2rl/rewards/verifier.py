"""Verifies a mathematical answer: the last \\boxed{...} of the response against the reference.

`rewards/answers` compares answers exactly. math-verify is used only for references outside that grammar (sums,
integrals, determinants). docs/rewards.md lists every decision. This module has no time limit: some answers make
math-verify run forever, inside C code that no signal handler interrupts. `RewardPool` runs it in processes that can be
killed.
"""

from __future__ import annotations

import logging
import re
import sys
from functools import lru_cache

from megatron_g2rl.rewards.answers.equations import has_equation, is_name, members, named_members, squeeze
from megatron_g2rl.rewards.answers.spelling import NUMBER_WORDS, normalize, read_number_word, unwrap_text
from megatron_g2rl.rewards.boxed import last_boxed

MATH_REWARD = "megatron_g2rl.rewards:math_reward"
"""Name of the built-in function in `reward.function`."""
MAX_ANSWER_CHARS = 20_000
"""Longer final answers are incorrect without being parsed."""
MAX_NESTING = 40
"""Answers with deeper nesting of brackets are incorrect without being parsed."""

logger = logging.getLogger(__name__)

_NUMBER_IN_BASE = re.compile(r"^\(?(\d[0-9A-Za-z]*)\)?_(?:\{(?:\\(?:text|mathrm)\{)?\(?(\d+|[a-z]+)\)?\}?\}|(\d))$")
_CHOICE = re.compile(r"\([A-Za-z]\)|[A-Z]")
_CHOICE_WITH_TEXT = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])\s*[.:)])(?=\s|\\|\d|\$|-|$)(.*)", re.DOTALL)
_CHOICE_WORD = re.compile(r"(?:option|choice)\s+", re.IGNORECASE)
_ANOTHER_CHOICE = re.compile(r"\([A-Z]\)|(?<![A-Za-z])[A-Z][.:)]|(?<![A-Za-z])(?:or|and|[A-Z])(?![A-Za-z])")
_APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])|≈")
_DATE = re.compile(r"\d{1,4}([/-])\d{1,2}\1\d{1,4}")
_MONTH = re.compile(r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)", re.IGNORECASE)
_WORD_OF_TEXT = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{4,}|\\(?:text|mbox|textbf|mathrm)\w*\s*\{[^{}]*[A-Za-z]{2}")
_ARTICLE = re.compile(r"\s*(?:an?|the)\s+(?=[a-z]{3})")
_TO = re.compile(r"(?<=\d)\s*(?:\\text\s*\{\s*)?\bto\b\s*\}?\s*(?=\d)")
_POINT = re.compile(r"[A-Z]'?\s*(\([^()]*,.*\))")
_OPERATOR = re.compile(r"[\\^_=<>{}+*/|]|(?<![A-Za-z])-")
_FUNCTION_NAMES = re.compile(r"\b(?:sqrt|sinh|cosh|tanh|arcsin|arccos|arctan|floor|ceil)\b")


def verify_math(completion: str, answer: str) -> float:
    """Whether a response's final answer equals the reference answer: 1.0 correct, 0.0 incorrect.

    Args:
        completion: the complete response; its last \\boxed{...} (after `</think>`) is the answer; no box is incorrect.
        answer: the reference, LaTeX or plain text, without the box. An empty reference matches nothing.

    There is no time limit: score model output through `RewardPool`. Answers that cannot be parsed are incorrect.
    """
    found = last_boxed(completion)
    if found is None or len(found) > MAX_ANSWER_CHARS or _nesting(found) > MAX_NESTING:
        return 0.0
    try:
        return float(_same_answer(answer, found))
    except MemoryError:
        raise
    except Exception:
        # A bug must not end a run at the first unusual answer: it is logged, and the answer is incorrect.
        logger.exception("verifying %.200r against %.200r failed: please report this", found, answer)
        return 0.0


def math_reward(response_text: str, answer: str) -> float:
    """Base reward of a verifiable task: +1.0 for a correct final answer, -1.0 otherwise (docs/method.md, section 3)."""
    return 1.0 if verify_math(response_text, answer) == 1.0 else -1.0


def prepare() -> None:
    """Import the comparison code, including math-verify, so that imports do not count against a deadline."""
    _same_answer("\\frac{1}{2}", "0.5")
    _same_by_math_verify("\\sum_{k=1}^{2} k", "3")


@lru_cache(maxsize=1024)
def _same_answer(raw_gold: str, raw_found: str) -> bool:
    """Compare two answers. Cached, because the responses of a group often have the same answer."""
    from megatron_g2rl.rewards.answers.equality import forget_constants
    from megatron_g2rl.rewards.answers.values import BUDGET

    BUDGET.start()
    forget_constants()
    gold, found = (read_number_word(normalize(side)) for side in (raw_gold, raw_found))
    if not gold or not found:
        return False
    if _compact(gold) == _compact(found):
        return True
    is_text = _WORD_OF_TEXT.search(_FUNCTION_NAMES.sub("", raw_gold)) is not None
    if _DATE.fullmatch(gold) or is_text and _same_text(gold, found):
        return _same_text(gold, found)
    if choice := _CHOICE.fullmatch(unwrap_text(gold).strip()):
        found = gold if _is_chosen(choice[0], _chosen(found)) else found
    if point := _POINT.fullmatch(found) if gold.startswith("(") else None:
        found = point[1]
    if ":" in gold + found:
        gold, found = _TO.sub(":", gold), _TO.sub(":", found)
    in_base = _compare_in_base(gold, found)
    if in_base is not None:
        return in_base
    golds, founds = _exact_sides(gold), _exact_sides(found)
    return any(_same_equations(one, other) for one in golds for other in founds)


def _same_equations(gold: str, found: str) -> bool:
    """Compare answers that may contain names and equations."""
    if not has_equation(gold):
        return _equations_hold(found) and _same(gold, _values(found, ordered="," in gold))
    ours = named_members(gold)
    if not has_equation(found):
        return all(member.name for member in ours if member.left) and _same(_values(gold, ordered=True), found)
    theirs = named_members(found)
    if len(ours) == len(theirs) and all(member.name for member in (*ours, *theirs)):
        if _same_named_values(ours, theirs):
            return _equations_hold(found)
    if len(ours) == len(theirs) == 1 and len(ours[0].left) == len(theirs[0].left) == 1:
        return _same(gold, found)
    return False


def _same_named_values(ours: list, theirs: list) -> bool:
    theirs = list(theirs)
    for member in ours:
        match = next(
            (other for other in theirs if other.name == member.name and _same(member.value, other.value)),
            None,
        )
        if match is None:
            return False
        theirs.remove(match)
    return True


def _values(answer: str, ordered: bool = False) -> str:
    """`1, 2` for `x = 1, y = 2` and 5 for `f(2) = x = 5`; an answer without equations is returned unchanged.

    If `ordered`, values of different letters become a tuple, `(1, 2)`, whose order identifies them.
    """
    if not has_equation(answer):
        return answer
    parts = members(answer)
    if len(parts) == 1:
        return parts[0].value
    values = ", ".join(member.value for member in parts)
    letters = {member.name and re.split("[_']", member.name)[0] for member in parts}
    if not ordered or None in letters or len(letters) < len(parts):
        return values
    if letters <= {"x", "y", "z"}:
        parts = sorted(parts, key=lambda member: member.name)
    return f"({', '.join(member.value for member in parts)})"


def _equations_hold(found: str) -> bool:
    """Whether every equation in an answer assigns a name to its value (x = 5) or is true (2 + 3 = 5).

    Without this, "x^2 - 4x = 0" would be correct for every problem whose answer is 0.
    """
    return not has_equation(found) or all(
        is_name(side) or _same_exactly(member.value, side) for member in members(found) for side in member.left
    )


def _exact_sides(answer: str) -> list[str]:
    """Both sides of an approximation such as `sqrt(2) ≈ 1.41` if the first rounds to the second; else the answer."""
    sides = [side.strip() for side in _APPROXIMATELY.split(answer)]
    if len(sides) == 1:
        return [answer]
    if len(sides) == 2 and not sides[0]:
        return [sides[1]]
    from megatron_g2rl.rewards.answers.quantities import is_rounding

    left = members(sides[0])[-1] if sides[0] else None
    if len(sides) != 2 or left is None or len(_parsed(left.value)) == 0 or len(_parsed(sides[1])) == 0:
        return [answer]
    if is_name(left.value):
        return [sides[1]]
    if not is_rounding(_parsed(left.value)[0], _parsed(sides[1])[0]):
        return [answer]
    return sides


def _same(gold: str, found: str) -> bool:
    """Compare two answers exactly; math-verify decides if the reference is outside the grammar."""
    if _same_exactly(gold, found):
        return True
    # math-verify ignores dots.
    return "\\" in gold and "\\ldots" not in gold and not _parsed(gold) and _same_by_math_verify(gold, found)


def _same_exactly(one: str, other: str) -> bool:
    """Compare all readings of two answers; text outside the grammar equals only itself."""
    from megatron_g2rl.rewards.answers.compare import same_answer
    from megatron_g2rl.rewards.answers.tokens import ParseError
    from megatron_g2rl.rewards.answers.values import TooMuchWorkError

    if _compact(one) == _compact(other):
        return True
    try:
        return any(same_answer(left, right) for left in _parsed(one) for right in _parsed(other))
    except (ParseError, TooMuchWorkError, RecursionError):
        return False


@lru_cache(maxsize=4096)
def _parsed(answer: str) -> tuple:
    """Parse trees of an answer, one per reading; empty if it is outside the grammar."""
    from megatron_g2rl.rewards.answers.grammar import parse
    from megatron_g2rl.rewards.answers.tokens import ParseError, readings

    trees = []
    text = unwrap_text(answer)
    for reading in readings(text):
        try:
            tree = parse(text, reading)
        except (ParseError, RecursionError):
            continue
        if tree not in trees:
            trees.append(tree)
    return tuple(trees)


def _same_by_math_verify(gold: str, found: str) -> bool:
    """Compare with math-verify; its timers are off: they need signals and do not interrupt C code."""
    from math_verify import LatexExtractionConfig, parse, verify

    # Parse only the box: by default, if the box does not parse, any number at its end is used.
    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    # It logs a warning, once per process, that its timers are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # Python refuses integer literals above 4300 digits by default; the length of the answer is bounded above.
    digits = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(MAX_ANSWER_CHARS + 10)
    try:
        parsed = [
            parse(f"\\boxed{{{side}}}", config, extraction_mode="first_match", parsing_timeout=None)
            for side in (gold, found)
        ]
        if not all(parsed) or not verify(*parsed, allow_set_relation_comp=True, timeout_seconds=None):
            return False
        return _is_close(parsed[0][0], parsed[1][0])
    except MemoryError:
        raise
    except Exception as error:
        logger.debug("math-verify failed on %.100r against %.100r: %s", found, gold, error)
        return False
    finally:
        sys.set_int_max_str_digits(digits)


def _is_close(gold: object, found: object) -> bool:
    """Compare two sympy numbers to 12 significant digits: math-verify compares only six decimal places."""
    import sympy

    if not all(isinstance(side, sympy.Expr) and side.is_number for side in (gold, found)):
        return True
    difference, size = sympy.N(gold - found, 30, maxn=200), max(abs(sympy.N(gold, 30)), abs(sympy.N(found, 30)))
    return bool(abs(difference) <= size * sympy.Float("1e-12"))


def _same_text(gold: str, found: str) -> bool:
    """Compare texts without case, punctuation and layout; dates in either order of month and day."""
    sides = []
    for side in (gold, found):
        if _OPERATOR.search(unwrap_text(side)) and not _DATE.fullmatch(side):
            return False
        text = unwrap_text(side).lower()
        text = text[article.end() :] if (article := _ARTICLE.match(text)) else text
        words = re.findall(r"[a-z]+|\d+(?:\.\d+)?|[^\sa-z\d.,;:'\"(){}\\]", text)
        words = [word.lstrip("0") or "0" if word.isdigit() else word for word in words]
        if _MONTH.search(side):
            words = sorted(
                word[:3] if word.isalpha() else word
                for word in words
                if word not in ("st", "nd", "rd", "th", "of", "the")
            )
        sides.append(words)
    return sides[0] == sides[1]


def _is_chosen(choice: str, chosen: str) -> bool:
    """Whether two choice letters are equal; case is ignored if either is in brackets."""
    one, other = choice.strip("()"), chosen.strip("()")
    return one == other or "(" in (choice[0], chosen[:1]) and one.lower() == other.lower()


def _chosen(found: str) -> str:
    """`A` for `(A) 12` or `A. 12`, unless another choice follows; other answers are returned unchanged."""
    found = _CHOICE_WORD.sub("", unwrap_text(found).strip())
    match = _CHOICE_WITH_TEXT.fullmatch(found)
    return found if match is None or _ANOTHER_CHOICE.search(match[3]) else match[1] or match[2]


def _compact(answer: str) -> str:
    """Remove white space, except between digits and letters: 2 2/3 is not 22/3."""
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", answer)


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
    """Compare if either side is a number with a base; None if neither is."""
    if not has_equation(gold):
        found = _values(found) if _equations_hold(found) else found
    gold_number, found_number = (_NUMBER_IN_BASE.match(squeeze(side)) for side in (gold, found))
    if gold_number is None and found_number is None:
        return None
    sides = []
    for side, number in ((gold, gold_number), (found, found_number)):
        digits, base = (number[1], _base(number[2] or number[3])) if number else (squeeze(side), 10)
        if not (2 <= base <= 36 and digits.isalnum() and digits.isascii()):
            return False
        sides.append((digits.upper().lstrip("0"), base))
    return sides[0] == sides[1]


def _base(text: str) -> int:
    """Base of `1011_{2}` or `1011_{\\text{two}}`; 0 if it is not a number."""
    return int(text) if text.isdigit() else NUMBER_WORDS.get(text, 0)
