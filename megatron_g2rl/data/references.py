"""Whether reference answers can be matched by any response, found before a run spends its first hour on reward -1.

Every reference is looked at; a sample of those that are no plain number is judged against itself by the verifier, in
the killable workers of a reward pool. Only for the built-in reward function: others decide what an answer is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

from megatron_g2rl.config.tree import DataConfig
from megatron_g2rl.data.columns import PRESETS

MATH_REWARD = "megatron_g2rl.rewards:math_reward"
SAMPLE = 400
"""References that the verifier judges at most."""
JUDGE = "megatron_g2rl.data.references:judge_reference"
AS_VALUE, VERBATIM, UNJUDGED = 1.0, 0.0, -1.0
_PLAIN = re.compile(r"[-+]?(?:\d{1,15}(?:\.\d{1,15})?|\d{1,3}(?:,\d{3}){1,5}|\d{1,15}/[1-9]\d{0,14}|[A-J])")
_OPAQUE = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
LONGEST_REFERENCE = 2_000
"""Characters of an answer; a longer reference is a solution."""


def is_plain(answer: str) -> bool:
    """Whether a reference is a plain number, a fraction or a letter of a choice: those need no judge."""
    return _PLAIN.fullmatch(answer) is not None


def prose_fault(answer: str) -> str:
    """Why a reference is no final answer but text around one ("": nothing speaks against it).

    Several words in a row outside of LaTeX are prose: a response would have to end in just these.
    """
    if is_plain(answer):
        return ""
    if "####" in answer:
        return "holds a solution with ####: set data.answer_regex=gsm8k"
    if "\\boxed" in answer:
        return "holds a box: set data.answer_regex=boxed"
    if len(answer) > LONGEST_REFERENCE:
        return f"has {len(answer)} characters"
    words = _WORD.findall(_OPAQUE.sub(" ", answer))
    return "is prose" if len(words) > 1 and not re.search(r"\d", answer) or len(words) > 3 else ""


def judge_reference(_: str, answer: str) -> float:
    """How far a reference can be judged, as a reward function.

    Returns:
        1: the value that it parses to is accepted; 0: only its own text is (a word, a choice); -1: not even that.
    """
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, latex

    from megatron_g2rl.rewards import verify_math

    if verify_math(f"\\boxed{{{answer}}}", answer) != 1.0:
        return UNJUDGED
    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    parsed = parse(f"\\boxed{{{answer}}}", config, extraction_mode="first_match", parsing_timeout=None)
    value = next((part for part in parsed if isinstance(part, Basic)), None)
    if value is None:
        return VERBATIM
    return AS_VALUE if verify_math(f"\\boxed{{{latex(value)}}}", answer) == 1.0 else VERBATIM


def sample_places(count: int) -> list[int]:
    """Which of `count` references are judged: all, or `SAMPLE` of them, the same in every run."""
    return list(range(count)) if count <= SAMPLE else sorted(Random(count).sample(range(count), SAMPLE))


def preset_hint(answers: Sequence[str], config: DataConfig) -> str:
    """The preset of `data.answer_regex` that finds an answer in most of these references, as advice ("": none)."""
    if config.answer_regex is not None or not answers:
        return ""
    found = {name: sum(_finds(extract, answer) for answer in answers) for name, extract in PRESETS.items()}
    best = max(found, key=found.__getitem__)
    if found[best] < 0.8 * len(answers):
        return ""
    return f"data.answer_regex={best} finds an answer in {found[best]} of the {len(answers)} looked at. "


def _finds(extract: Callable[[str], str | None], text: str) -> bool:
    answer = extract(text)
    return bool(answer) and not prose_fault(answer)
