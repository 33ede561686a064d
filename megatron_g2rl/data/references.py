"""Checks that reference answers can be matched by a response, before a run spends its first hour on reward -1.

Every reference is classified; a sample of those that are not plain numbers is verified against itself, in the workers
of a reward pool. Only for the built-in reward function: other functions define their own answers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.config.sections.rewards import RewardConfig
from megatron_g2rl.data.columns import PRESETS
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.data.faults import Faults
from megatron_g2rl.rewards.pool import RewardPool

log = logging.getLogger(__name__)

SAMPLE = 2_000
"""Maximum sampled references."""
MOST_VERIFIED = 400
"""Maximum distinct references to verify, which takes a second or two."""
MOST_WORKERS = 2
VERIFIER = "megatron_g2rl.data.references:verify_reference"
AS_VALUE, VERBATIM, UNVERIFIABLE = 1.0, 0.0, -1.0
_PLAIN = re.compile(r"[-+]?(?:\d{1,15}(?:\.\d{1,15})?|\d{1,3}(?:,\d{3}){1,5}|\d{1,15}/[1-9]\d{0,14}|[A-J])")
_OPAQUE = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|operatorname|mbox)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")
LONGEST_REFERENCE = 2_000
"""Maximum characters of a final answer; a longer reference is a solution text."""


def is_plain(answer: str) -> bool:
    """Whether a reference is a plain number, a fraction or a choice letter, which need no verification."""
    return _PLAIN.fullmatch(answer) is not None


def prose_fault(answer: str) -> str:
    """Why a reference is not a final answer but text around one ("" if it may be one).

    Several words in a row outside LaTeX are prose: a response would have to end in exactly these.
    """
    if is_plain(answer):
        return ""
    if "####" in answer:
        return "contains a solution with ####: set data.answer_regex=gsm8k"
    if "\\boxed" in answer:
        return "contains a box: set data.answer_regex=boxed"
    if len(answer) > LONGEST_REFERENCE:
        return f"has {len(answer)} characters"
    words = _WORD.findall(_OPAQUE.sub(" ", answer))
    return "is prose" if len(words) > 1 and not re.search(r"\d", answer) or len(words) > 3 else ""


def verify_reference(_: str, answer: str) -> float:
    """Reward function that scores whether a reference can be verified.

    Returns:
        1 if the value it parses to is accepted; 0 if only its own text is (a word, a choice); -1 if not even that.
    """
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, latex

    from megatron_g2rl.rewards import verify_math

    if verify_math(f"\\boxed{{{answer}}}", answer) != 1.0:
        return UNVERIFIABLE
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timers are off; the pool has deadlines
    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    parsed = parse(f"\\boxed{{{answer}}}", config, extraction_mode="first_match", parsing_timeout=None)
    value = next((part for part in parsed if isinstance(part, Basic)), None)
    if value is None:
        return VERBATIM
    return AS_VALUE if verify_math(f"\\boxed{{{latex(value)}}}", answer) == 1.0 else VERBATIM


@dataclass
class References:
    """Result of checking the references of a source."""

    total: int
    """Number of references, all of which were classified."""
    prose: Faults
    """References that are not final answers."""
    sampled: int = 0
    """Size of the sample."""
    counts: dict[str, int] = field(default_factory=dict)
    """Counts in the sample: `plain` (numbers and letters), `value`, `verbatim` and `unverifiable`."""
    unverifiable: Faults = field(default_factory=Faults)
    """Sampled references that the verifier rejects against themselves."""
    hint: str = ""
    """Suggested setting that would extract more answers."""

    @property
    def unverifiable_fraction(self) -> float:
        """Fraction of the references that no response can match; estimated from the sample for those not prose."""
        return min(1.0, self.prose.count / max(1, self.total) + self.unverifiable.count / max(1, self.sampled))

    def describe(self) -> str:
        """One line with the counts, and the first references that cannot be verified."""
        text = f"references: {self.prose.count} of {self.total} are not final answers"
        if self.sampled:
            scope = "all" if self.sampled == self.total else f"a sample of {self.sampled}"
            text += f"; {scope}: " + ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
        listed = [faults.listing() for faults in (self.prose, self.unverifiable) if faults.count]
        return "\n  ".join([text, *listed])

    def check(self, config: DataConfig) -> None:
        """Log the references that cannot be verified.

        Raises:
            DataError: their fraction exceeds `config.max_unverifiable`.
        """
        if self.unverifiable_fraction > config.max_unverifiable:
            raise DataError(
                f"{self.unverifiable_fraction:.1%} of the reference answers of {config.label} cannot be matched by any "
                f"response, over data.max_unverifiable={config.max_unverifiable:g}. {self.hint}Fix "
                f"data.answer_column or data.answer_regex, or raise data.max_unverifiable:\n  {self.describe()}"
            )
        log.log(logging.WARNING if self.unverifiable_fraction else logging.INFO, "%s", self.describe())


def verify_references(
    answers: Sequence[str], place: Callable[[int], str], prose: Faults, total: int, reward: RewardConfig
) -> References:
    """Verify references against themselves and against the values that they parse to.

    Args:
        answers: the sample (see `sample_places`).
        place: maps an index in the sample to the reference's location.
        prose: those of all references that are not final answers.
        total: number of all references.
        reward: settings of workers and deadline.
    """
    report = References(total, prose, len(answers))
    counts = dict.fromkeys(("plain", "value", "verbatim", "unverifiable"), 0)
    counts["plain"] = sum(map(is_plain, answers))
    unsettled = [i for i, answer in enumerate(answers) if not is_plain(answer) and not prose_fault(answer)]
    distinct = list(dict.fromkeys(answers[i] for i in unsettled))[:MOST_VERIFIED]
    rewards: dict[str, float] = {}
    if distinct:
        with RewardPool(VERIFIER, min(reward.workers, MOST_WORKERS), reward.deadline_s) as pool:
            rewards = dict(zip(distinct, pool.score([("", answer) for answer in distinct]).rewards, strict=True))
    names = {AS_VALUE: "value", VERBATIM: "verbatim", UNVERIFIABLE: "unverifiable"}
    for i in unsettled:
        if answers[i] in rewards:
            counts[names[rewards[answers[i]]]] += 1
            if rewards[answers[i]] == UNVERIFIABLE:
                report.unverifiable.add(place(i), f"{answers[i][:60]!a} is rejected by the verifier against itself")
    report.counts = counts
    return report


def sample_places(count: int) -> list[int]:
    """Indices of the sampled references: all, or `SAMPLE` of them, the same in every run."""
    return list(range(count)) if count <= SAMPLE else sorted(Random(count).sample(range(count), SAMPLE))


def preset_hint(answers: Sequence[str], config: DataConfig) -> str:
    """Advice to set the `data.answer_regex` preset that fits most of these solutions ("": none does)."""
    if not answers or any(source.answer_regex for source in config.each_source()):
        return ""
    hits = {name: sum(_finds(extract, answer) for answer in answers) for name, extract in PRESETS.items()}
    best = max(hits, key=hits.__getitem__)
    if hits[best] < 0.8 * len(answers):
        return ""
    return f"data.answer_regex={best} finds an answer in {hits[best]} of {len(answers)} of these. "


def _finds(extract: Callable[[str], str | None], text: str) -> bool:
    answer = extract(text)
    return bool(answer) and not prose_fault(answer)
