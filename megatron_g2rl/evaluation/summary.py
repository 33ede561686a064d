"""Metrics of an evaluation: accuracy over problems with bootstrap intervals, and the health of its responses.

Training and `g2rl evaluate` use this code, so their numbers agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from megatron_g2rl.config.benchmark import DISTINCT, split_metric
from megatron_g2rl.evaluation.estimators import distinct_at_k, majority_at_k, mean_at_k, pass_at_k
from megatron_g2rl.records import ResponseGroup, responses_of
from megatron_g2rl.rewards.boxed import last_boxed
from megatron_g2rl.rewards.choices import last_letter

EXTRACTORS: dict[str, Callable[[str], str | None]] = {"boxed": last_boxed, "letter": last_letter}
"""`answer` of a benchmark: the final answer of a response, None without one."""
LOOP_COPIES, LOOP_TOKENS, LONGEST_PERIOD = 4, 32, 512
"""A response loops if it ends with this many copies of the same tokens, which are at least `LOOP_TOKENS` in total."""
RESAMPLES, CONFIDENCE = 2000, 0.95
"""Bootstrap: number of samples of the problems, and confidence level of the intervals."""


@dataclass(frozen=True)
class Evaluation:
    """Scored responses to a set of problems."""

    groups: tuple[ResponseGroup, ...]
    """One group of n responses per problem."""
    answers: tuple[tuple[str | None, ...], ...]
    """Per problem: final answer of each response; None without one."""
    correct: tuple[tuple[bool, ...], ...]
    """Per problem: whether each response is correct."""
    timeouts: int = 0
    """Responses scored as incorrect because the reward function exceeded its deadline."""
    forms: tuple[tuple[str | None, ...], ...] | None = None
    """Per problem: canonical form of each correct response, as in `Experience.forms`; None without forms."""

    @classmethod
    def of(
        cls,
        groups: Sequence[ResponseGroup],
        correct: Sequence[bool],
        answer: str = "boxed",
        timeouts: int = 0,
        forms: Sequence[str | None] | None = None,
    ) -> Evaluation:
        """From groups of n responses each, and correctness in group order.

        Args:
            groups: problems and responses.
            correct: whether each response is correct, in group order.
            answer: a name in `EXTRACTORS`.
            timeouts: see the attribute.
            forms: canonical forms in group order; None without forms.
        """
        extract = EXTRACTORS[answer]
        n = len(groups[0].responses)
        starts = range(0, len(correct), n)
        rows = tuple(tuple(correct[start : start + n]) for start in starts)
        forms = None if forms is None else tuple(tuple(forms[start : start + n]) for start in starts)
        answers = tuple(tuple(extract(response.text) for response in group.responses) for group in groups)
        return cls(tuple(groups), answers, rows, timeouts, forms)

    def per_problem(self, metrics: Sequence[str]) -> dict[str, list[float]]:
        """The value of each metric for each problem, by its name in files.

        Args:
            metrics: such as `pass@16`.

        Returns:
            `pass_at_16` and so on, then with forms `distinct_correct_at_K` for every `pass@K` with K > 1, then
            `confidently_incorrect_fraction`.
        """
        values = {metric.replace("@", "_at_"): self._accuracies(*split_metric(metric)) for metric in metrics}
        for kind, k in map(split_metric, metrics):
            if self.forms is not None and kind == "pass" and k > 1:
                values[f"{DISTINCT}{k}"] = [distinct_at_k(row, k) for row in self.forms]
        confident = [float(is_confidently_incorrect(*row)) for row in zip(self.answers, self.correct, strict=True)]
        return values | {"confidently_incorrect_fraction": confident}

    def _accuracies(self, kind: str, k: int) -> list[float]:
        if kind == "maj":
            return [majority_at_k(*row, k) for row in zip(self._votes(), self.correct, strict=True)]
        return [pass_at_k(row, k) if kind == "pass" else mean_at_k(row) for row in self.correct]

    def _votes(self) -> Sequence[Sequence[str | None]]:
        """What each response votes for: its canonical form, if it has one, else its final answer."""
        if self.forms is None:
            return self.answers
        return [
            [form or answer for form, answer in zip(*row, strict=True)]
            for row in zip(self.forms, self.answers, strict=True)
        ]

    def metrics(self, metrics: Sequence[str]) -> dict[str, float]:
        """The mean of each accuracy metric over the problems, and the health of the responses.

        `response_length_mean` is in tokens, the fractions `truncated_fraction` (at the length limit),
        `unparsed_fraction` (without a final answer) and `repetitive_fraction` (ending in a loop) are over responses,
        `confidently_incorrect_fraction` is over problems, and `timeouts` is a number of responses.
        """
        responses = responses_of(self.groups)
        values = {name: fmean(column) for name, column in self.per_problem(metrics).items()}
        confident = values.pop("confidently_incorrect_fraction")
        return values | {
            "response_length_mean": fmean(len(response.token_ids) for response in responses),
            "truncated_fraction": fmean(response.finish_reason == "length" for response in responses),
            "unparsed_fraction": fmean(answer is None for row in self.answers for answer in row),
            "repetitive_fraction": fmean(ends_in_loop(response.token_ids) for response in responses),
            "confidently_incorrect_fraction": confident,
            "timeouts": float(self.timeouts),
        }


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether a response ends with `LOOP_COPIES` copies of the same tokens, at least `LOOP_TOKENS` in total."""
    if len(tokens) < LOOP_TOKENS:
        return False
    ids = np.asarray(tokens[-(LOOP_COPIES * LONGEST_PERIOD) :])
    longest = min(LONGEST_PERIOD, len(ids) // LOOP_COPIES)
    candidates = np.flatnonzero(ids[-1 - longest : -1][::-1] == ids[-1]) + 1  # periods at which the last token recurs
    for period in candidates.tolist():
        # the shortest multiple of a short period that has enough tokens
        length = max(LOOP_COPIES * period, -(-LOOP_TOKENS // period) * period)
        if length <= len(ids) and np.array_equal(ids[-length:-period], ids[len(ids) - length + period :]):
            return True
    return False


def is_confidently_incorrect(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Whether more than half of the responses to a problem agree on one answer and none of them is correct."""
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return False
    answer, count = votes.most_common(1)[0]
    is_correct = any(flag for given, flag in zip(answers, correct, strict=True) if given == answer)
    return 2 * count > len(answers) and len(answers) > 1 and not is_correct


def intervals(per_problem: Mapping[str, Sequence[float]], seed: int = 0) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of the means: `RESAMPLES` samples of the problems with replacement.

    All metrics use the same samples, and the same seed gives the same intervals.

    Args:
        per_problem: values of each metric, in the same order of problems.
        seed: seed of the samples.
    """
    names = list(per_problem)
    table = np.array([per_problem[name] for name in names], dtype=np.float64)
    problems = table.shape[1]
    draws = np.random.default_rng(seed)
    # counts of a multinomial instead of indices: one row of `problems` numbers per sample
    means = np.stack([table @ draws.multinomial(problems, [1 / problems] * problems) for _ in range(RESAMPLES)])
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means / problems, [tail, 100 - tail], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}
