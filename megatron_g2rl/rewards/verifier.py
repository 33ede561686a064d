"""Judges one mathematical answer: last \\boxed{...} of the response against the reference.

The answers are compared exactly by `rewards/answers`. math-verify judges only references outside that grammar (sums,
integrals, determinants). docs/rewards.md lists every decision. Nothing here watches the clock: some answers make
math-verify compute without end, inside C code that no signal handler interrupts. `RewardPool` runs it in processes that
can be killed.
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
"""The built-in function, as `reward.function` names it."""
MAX_ANSWER_CHARS = 20_000
"""A longer final answer is wrong without being read."""
MAX_NESTING = 40
"""An answer with deeper brackets is wrong without being parsed."""

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
    """Whether a response's final answer is the reference answer: 1.0 correct, 0.0 wrong.

    Args:
        completion: the whole response; its last \\boxed{...} (after `</think>`) is the answer, no box is wrong.
        answer: the reference: LaTeX or plain, without the box. An empty one matches nothing.

    It has no time limit of its own: judge what a model wrote through `RewardPool`. What cannot be parsed is wrong.
    """
    found = last_boxed(completion)
    if found is None or len(found) > MAX_ANSWER_CHARS or _nesting(found) > MAX_NESTING:
        return 0.0
    try:
        return float(_same_answer(answer, found))
    except MemoryError:
        raise
    except Exception:
        # A defect must not end a run at the first odd answer; it is logged, and the answer is wrong.
        logger.exception("no verdict on %.200r for %.200r: please report this", found, answer)
        return 0.0


def math_reward(response_text: str, answer: str) -> float:
    """Base reward of a verifiable task: +1.0 for a correct final answer, -1.0 otherwise (docs/method.md, section 3)."""
    return 1.0 if verify_math(response_text, answer) == 1.0 else -1.0


def prepare() -> None:
    """Import what compares answers, math-verify included, so that no answer's deadline pays for it."""
    _same_answer("\\frac{1}{2}", "0.5")
    _same_by_math_verify("\\sum_{k=1}^{2} k", "3")


@lru_cache(maxsize=1024)
def _same_answer(raw_gold: str, raw_found: str) -> bool:
    """Cached: the responses of a group often end in the same answer."""
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
    """Compare answers that may have names and equations in them."""
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
    """`1, 2` for `x = 1, y = 2` and 5 for `f(2) = x = 5`; an answer without equations as it is.

    Where `ordered`, values of different letters are a tuple, `(1, 2)`: their order says which is which.
    """
    if not has_equation(answer):
        return answer
    cut = members(answer)
    if len(cut) == 1:
        return cut[0].value
    values = ", ".join(member.value for member in cut)
    letters = {member.name and re.split("[_']", member.name)[0] for member in cut}
    if not ordered or None in letters or len(letters) < len(cut):
        return values
    if letters <= {"x", "y", "z"}:
        cut = sorted(cut, key=lambda member: member.name)
    return f"({', '.join(member.value for member in cut)})"


def _equations_hold(found: str) -> bool:
    """Whether every equation in an answer names its value (x = 5) or is true (2 + 3 = 5).

    Without this, "x^2 - 4x = 0" would earn every problem whose answer is 0.
    """
    return not has_equation(found) or all(
        is_name(side) or _same_exactly(member.value, side) for member in members(found) for side in member.left
    )


def _exact_sides(answer: str) -> list[str]:
    """Both sides of `sqrt(2) = 1.41` up to rounding, when the second is what the first rounds to; else the answer."""
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
    """Compare two answers exactly; math-verify decides when the reference is mathematics outside the grammar."""
    if _same_exactly(gold, found):
        return True
    # math-verify passes over dots.
    return "\\" in gold and "\\ldots" not in gold and not _parsed(gold) and _same_by_math_verify(gold, found)


def _same_exactly(one: str, other: str) -> bool:
    """Compare two answers in every way to read them; what is outside the grammar equals only itself."""
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
    """Trees of an answer, one for each way to read it; none for what is outside the grammar."""
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
    """math-verify's verdict; its own timers are off, they need signals and miss what hangs in C."""
    from math_verify import LatexExtractionConfig, parse, verify

    # The box and nothing else: by default a box that does not parse is searched for any number at its end.
    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    # It warns on the error stream, once per process, that its timers are off.
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
        logger.debug("math-verify could not judge %.100r against %.100r: %s", found, gold, error)
        return False
    finally:
        sys.set_int_max_str_digits(digits)


def _is_close(gold: object, found: object) -> bool:
    """Two numbers of sympy to 12 significant digits: math-verify compares six decimal places."""
    import sympy

    if not all(isinstance(side, sympy.Expr) and side.is_number for side in (gold, found)):
        return True
    difference, size = sympy.N(gold - found, 30, maxn=200), max(abs(sympy.N(gold, 30)), abs(sympy.N(found, 30)))
    return bool(abs(difference) <= size * sympy.Float("1e-12"))


def _same_text(gold: str, found: str) -> bool:
    """Words in any case, without punctuation and layout; a date in either order of its month and day."""
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
    """Whether the letters are the same; in brackets, on either side, in any case."""
    one, other = choice.strip("()"), chosen.strip("()")
    return one == other or "(" in (choice[0], chosen[:1]) and one.lower() == other.lower()


def _chosen(found: str) -> str:
    """`A` for `(A) 12` or `A. 12`, unless another choice follows; anything else as it is."""
    found = _CHOICE_WORD.sub("", unwrap_text(found).strip())
    match = _CHOICE_WITH_TEXT.fullmatch(found)
    return found if match is None or _ANOTHER_CHOICE.search(match[3]) else match[1] or match[2]


def _compact(answer: str) -> str:
    """Without white space, but for that between digits and letters: 2 2/3 is not 22/3."""
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
    """Compare when either side is a number written in a base; None when neither is."""
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
    """Base of `1011_{2}` or `1011_{\\text{two}}`; 0: none."""
    return int(text) if text.isdigit() else NUMBER_WORDS.get(text, 0)
