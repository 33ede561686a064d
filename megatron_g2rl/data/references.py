"""Whether reference answers can be matched by any response, found before a run spends its first hour on reward -1.

Every reference is looked at; a sample of those that are no plain number is verified against itself, in
the killable workers of a reward pool. Only for the built-in reward function: others decide what an answer is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from megatron_g2rl.config.tree import DataConfig, RewardConfig
from megatron_g2rl.data.columns import PRESETS
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.data.faults import Faults
from megatron_g2rl.rewards.pool import RewardPool

log = logging.getLogger(__name__)

SAMPLE = 2_000
"""References that are looked at closely, at most."""
MOST_VERIFIED = 400
"""Different ones among them that are verified, at most: a second or two."""
MOST_WORKERS = 2
VERIFIER = "megatron_g2rl.data.references:verify_reference"
AS_VALUE, VERBATIM, UNVERIFIABLE = 1.0, 0.0, -1.0
_PLAIN = re.compile(r"[-+]?(?:\d{1,15}(?:\.\d{1,15})?|\d{1,3}(?:,\d{3}){1,5}|\d{1,15}/[1-9]\d{0,14}|[A-J])")
_OPAQUE = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
LONGEST_REFERENCE = 2_000
"""Characters of an answer; a longer reference is a solution."""


def is_plain(answer: str) -> bool:
    """Whether a reference is a plain number, a fraction or a letter of a choice: those need no verification."""
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


def verify_reference(_: str, answer: str) -> float:
    """How far a reference can be verified, as a reward function.

    Returns:
        1: the value that it parses to is accepted; 0: only its own text is (a word, a choice); -1: not even that.
    """
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, latex

    from megatron_g2rl.rewards import verify_math

    if verify_math(f"\\boxed{{{answer}}}", answer) != 1.0:
        return UNVERIFIABLE
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timers are off: the pool has one
    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    parsed = parse(f"\\boxed{{{answer}}}", config, extraction_mode="first_match", parsing_timeout=None)
    value = next((part for part in parsed if isinstance(part, Basic)), None)
    if value is None:
        return VERBATIM
    return AS_VALUE if verify_math(f"\\boxed{{{latex(value)}}}", answer) == 1.0 else VERBATIM


@dataclass
class References:
    """How far the references of a source can be verified."""

    total: int
    """References, each of which was looked at."""
    prose: Faults
    """Those that are no final answer."""
    sampled: int = 0
    """References of the sample."""
    counts: dict[str, int] = field(default_factory=dict)
    """Of the sample: `plain` numbers and letters, `value`, `verbatim` and `unverifiable`."""
    unverifiable: Faults = field(default_factory=Faults)
    """Of the sample: those that the verifier refuses against themselves."""
    hint: str = ""
    """What would read more of them."""

    @property
    def unverifiable_fraction(self) -> float:
        """Fraction of the references that no response can match; of those that are no prose an estimate."""
        return min(1.0, self.prose.count / max(1, self.total) + self.unverifiable.count / max(1, self.sampled))

    def describe(self) -> str:
        """One line with the numbers, and the first of those that cannot be verified."""
        text = f"references: {self.prose.count} of {self.total} are no final answer"
        if self.sampled:
            looked = "all" if self.sampled == self.total else f"a sample of {self.sampled}"
            text += f"; {looked}: " + ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
        listed = [faults.listing() for faults in (self.prose, self.unverifiable) if faults.count]
        return "\n  ".join([text, *listed])

    def check(self, config: DataConfig) -> None:
        """Log what cannot be verified.

        Raises:
            DataError: it is a larger fraction than `config.max_unverifiable`.
        """
        if self.unverifiable_fraction > config.max_unverifiable:
            raise DataError(
                f"{self.unverifiable_fraction:.1%} of the reference answers of {config.label} cannot be matched by any "
                f"response, over data.max_unverifiable={config.max_unverifiable:g}. {self.hint}Correct "
                f"data.answer_column or data.answer_regex, or raise data.max_unverifiable:\n  {self.describe()}"
            )
        log.log(logging.WARNING if self.unverifiable_fraction else logging.INFO, "%s", self.describe())


def verify_references(
    answers: Sequence[str], place: Callable[[int], str], prose: Faults, total: int, reward: RewardConfig
) -> References:
    """Verify references against themselves and against the values that they parse to.

    Args:
        answers: the sample (see `sample_places`).
        place: from a place in the sample to where the reference came from.
        prose: those of all references that are no final answer.
        total: number of all references.
        reward: its workers and deadline are used.
    """
    found = References(total, prose, len(answers))
    counts = dict.fromkeys(("plain", "value", "verbatim", "unverifiable"), 0)
    counts["plain"] = sum(map(is_plain, answers))
    open_places = [i for i, answer in enumerate(answers) if not is_plain(answer) and not prose_fault(answer)]
    distinct = list(dict.fromkeys(answers[i] for i in open_places))[:MOST_VERIFIED]
    verdicts: dict[str, float] = {}
    if distinct:
        with RewardPool(VERIFIER, min(reward.workers, MOST_WORKERS), reward.deadline_s) as pool:
            verdicts = dict(zip(distinct, pool.score([("", answer) for answer in distinct]).rewards, strict=True))
    names = {AS_VALUE: "value", VERBATIM: "verbatim", UNVERIFIABLE: "unverifiable"}
    for i in open_places:
        if answers[i] in verdicts:
            counts[names[verdicts[answers[i]]]] += 1
            if verdicts[answers[i]] == UNVERIFIABLE:
                found.unverifiable.add(place(i), f"{answers[i][:60]!a} is refused by the verifier against itself")
    found.counts = counts
    return found


def sample_places(count: int) -> list[int]:
    """Which of `count` references are verified: all, or `SAMPLE` of them, the same in every run."""
    return list(range(count)) if count <= SAMPLE else sorted(Random(count).sample(range(count), SAMPLE))


def preset_hint(answers: Sequence[str], config: DataConfig) -> str:
    """The preset of `data.answer_regex` that finds an answer in most of these solutions, as advice ("": none)."""
    if not answers or any(source.answer_regex for source in config.each_source()):
        return ""
    found = {name: sum(_finds(extract, answer) for answer in answers) for name, extract in PRESETS.items()}
    best = max(found, key=found.__getitem__)
    if found[best] < 0.8 * len(answers):
        return ""
    return f"data.answer_regex={best} finds an answer in {found[best]} of {len(answers)} of these. "


def _finds(extract: Callable[[str], str | None], text: str) -> bool:
    answer = extract(text)
    return bool(answer) and not prose_fault(answer)
