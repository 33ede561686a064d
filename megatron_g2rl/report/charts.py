"""Definitions of the charts: metrics, explanation, and whether higher or lower is better.

A chart is omitted if no run has any of its metrics. Metrics without a chart are listed in a table at the end;
`evaluation/*` and `time/*_s` get charts automatically.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_g2rl.report.runs import EVALUATION


@dataclass(frozen=True)
class Line:
    """One metric of a chart; the second is dashed, the third dotted."""

    metric: str
    label: str = ""
    """Label that distinguishes it from the other lines of the chart."""


@dataclass(frozen=True)
class Chart:
    """One plot and its table."""

    title: str
    lines: tuple[Line, ...]
    note: str
    """What the chart shows, with its unit, and how to read it."""
    better: Literal["higher", "lower"] | None = None
    """Which extreme is best; None: the table shows the range."""
    percent: bool = False
    log: bool = False
    reference: float | None = None
    """Value at which to draw a thin horizontal line."""


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    title: str
    note: str
    charts: tuple[Chart, ...]


LEARNING = Section(
    "Learning",
    "On the training problems of each step.",
    (
        Chart(
            "Pass rate",
            (Line("reward/pass_rate"),),
            "Fraction of responses that are correct.",
            better="higher",
            percent=True,
        ),
        Chart(
            "Reward",
            (Line("reward/mean", "base"), Line("reward/shaped_mean", "shaped")),
            "Mean reward of a response before and after shaping by the exploration term.",
            better="higher",
        ),
        Chart(
            "Groups used",
            (Line("reward/groups_used_fraction"),),
            "Fraction of groups whose shaped rewards differ; groups with equal rewards have no gradient.",
            percent=True,
        ),
    ),
)

DIRECTIONS = Section(
    "Directions and exploration",
    "Each response is represented by the direction in which it would update the model. These charts compare the "
    "directions of the responses to one problem, which G2RL rewards and GRPO ignores.",
    (
        Chart(
            "Gradient cosine",
            (Line("geometry/mean_cosine"),),
            "Mean cosine between the directions of two responses to one problem: 1 is the same update, 0 unrelated, "
            "below 0 opposed.",
            reference=0.0,
        ),
        Chart(
            "Distribution of the cosines",
            (
                Line("geometry/cosine_median", "median"),
                Line("geometry/cosine_p10", "lowest tenth"),
                Line("geometry/cosine_p90", "highest tenth"),
            ),
            "Over all pairs of a step: half of the cosines are below the median, a tenth below the lower line, a tenth "
            "above the upper line.",
            reference=0.0,
        ),
        Chart(
            "Opposed and unrelated pairs",
            (Line("geometry/negative_fraction", "opposed"), Line("geometry/orthogonal_fraction", "unrelated")),
            "Fraction of pairs with a cosine below 0, and with a cosine between −0.1 and 0.1.",
            percent=True,
        ),
        Chart(
            "Effective rank",
            (Line("geometry/effective_rank"),),
            "Number of distinct directions in a group: 1 if all responses have the same one, at most the group size.",
        ),
        Chart(
            "Novelty by correctness",
            (Line("exploration/novelty_correct", "correct"), Line("exploration/novelty_incorrect", "incorrect")),
            "Mean ν: 1 for a response whose direction is unique in its group, 0 for one that repeats the others.",
        ),
    ),
)

POLICY = Section(
    "Policy",
    "How the behavior of the model changes.",
    (
        Chart(
            "Entropy",
            (Line("policy/entropy"),),
            "Mean entropy of the next token (nats). Near 0, sampling no longer explores.",
        ),
        Chart(
            "Response length",
            (Line("response_length/mean", "mean"), Line("response_length/max", "longest")),
            "Tokens per response.",
        ),
        Chart(
            "Truncated responses",
            (Line("response/truncated_fraction"),),
            "Fraction of responses truncated at the length limit.",
            percent=True,
        ),
        Chart(
            "Distance from the reference",
            (Line("update/kl"),),
            "KL divergence from the model before training (nats per token), as estimated in the loss.",
        ),
        Chart("Gradient norm", (Line("update/gradient_norm"),), "Before clipping, mean over the updates of a step."),
        Chart(
            "Clipped tokens",
            (Line("update/clip_fraction_high", "ratio too high"), Line("update/clip_fraction_low", "ratio too low")),
            "Fraction of tokens whose importance ratio is outside the clip range.",
            percent=True,
        ),
    ),
)

MISMATCH = Section(
    "Rollout engine against trainer",
    "The rollout engine and the trainer should assign the same probability to every token.",
    (
        Chart(
            "Log-prob difference",
            (Line("mismatch/logprob_difference_mean", "mean"), Line("mismatch/logprob_difference_max", "largest")),
            "Absolute difference per token (nats), on a logarithmic scale.",
            better="lower",
            log=True,
        ),
        Chart(
            "KL divergence",
            (Line("mismatch/kl"),),
            "Between rollout engine and trainer, in nats per token.",
            better="lower",
            log=True,
        ),
        Chart(
            "Truncated weights",
            (Line("mismatch/truncated_fraction"),),
            "Fraction of tokens whose importance weight reached its cap.",
            better="lower",
            percent=True,
        ),
    ),
)

COST = Section(
    "Time",
    "Wall-clock time on the machine of each run; other work on that machine increases it.",
    (
        Chart("Step time", (Line("time/step_s"),), "Seconds per step.", better="lower"),
        Chart(
            "Throughput",
            (Line("throughput/response_tokens_per_s"),),
            "Response tokens divided by the total step time, not by generation time alone.",
            better="higher",
        ),
        Chart(
            "Cost of exploration",
            (
                Line("cost/features_s", "features Φ"),
                Line("cost/reduce_s", "their sum over ranks"),
                Line("cost/shaping_s", "novelty and rewards"),
            ),
            "Seconds per step. A lower bound, measured inside the computation. Φ is part of the old-log-prob pass, "
            "which GRPO without Φ does not need for the first update of a step; if Φ comes from the top-K tokens of "
            "the rollout engine, the time to report them is not included.",
            better="lower",
        ),
        Chart(
            "Cost of exploration per response",
            (Line("cost/per_response_ms", "per response"), Line("cost/per_group_ms", "per group")),
            "Sum of the three, in milliseconds.",
            better="lower",
        ),
        Chart(
            "Exploration fraction",
            (Line("cost/step_fraction"),),
            "Cost of exploration as a fraction of the total step time.",
            better="lower",
            percent=True,
        ),
    ),
)


def sections(names: Iterable[str]) -> list[Section]:
    """The sections for runs with these metrics; charts and lines without a metric are omitted.

    Time per phase belongs to the section `COST`, which is included if any phase was timed.
    """
    names = set(names)
    all_sections = [LEARNING, evaluation(names), DIRECTIONS, POLICY, MISMATCH, COST]
    present = [
        Section(s.title, s.note, tuple(c for c in (_present(c, names) for c in s.charts) if c)) for s in all_sections
    ]
    timed = any(map(is_phase, names))
    return [section for section in present if section.charts or (timed and section.title == COST.title)]


EVALUATION_NOTES = {
    "pass_at_1$": "Fraction of correct responses, mean over the problems.",
    "pass_at_": "Fraction of problems with at least one correct response among this many.",
    "maj_at_": "Fraction of problems whose most frequent answer is correct.",
    "response_length_mean": "Tokens per response.",
    "truncated_fraction": "Fraction of responses truncated at the length limit.",
    "timeouts": "Responses scored as incorrect because scoring timed out.",
}


def evaluation(names: set[str]) -> Section:
    """A chart for every `evaluation/*` metric."""
    charts = []
    for name in sorted((name for name in names if name.startswith(EVALUATION)), key=_evaluation_order):
        metric = name.removeprefix(EVALUATION)
        fraction = metric.endswith("fraction") or any(word in metric for word in ("pass", "accuracy", "_at_"))
        accuracy = fraction and not metric.endswith("fraction")
        title = metric.replace("_at_", "@").replace("_", " ").replace("/", ": ")
        note = next((text for word, text in EVALUATION_NOTES.items() if f"{metric}$".startswith(word)), "")
        better = "higher" if accuracy else None
        charts.append(Chart(title[:1].upper() + title[1:], (Line(name),), note, better=better, percent=fraction))
    return Section(
        "Evaluation set",
        "Problems that are not in the training set, evaluated periodically; step 0 is the model before training.",
        tuple(charts),
    )


def leftover(names: Iterable[str], drawn: Iterable[Section]) -> list[str]:
    """Metrics that are in no chart."""
    shown = {line.metric for section in drawn for chart in section.charts for line in chart.lines}
    return sorted(name for name in names if name not in shown and not is_phase(name))


def is_phase(name: str) -> bool:
    """Whether a metric is the time of one phase of a step."""
    return name.startswith("time/") and name.endswith("_s") and name != "time/step_s"


def _present(chart: Chart, names: set[str]) -> Chart | None:
    lines = tuple(line for line in chart.lines if line.metric in names)
    return Chart(**{**vars(chart), "lines": lines}) if lines else None


def _evaluation_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Accuracies first; pass_at_8 before pass_at_16."""
    parts = name.replace("/", "_").split("_")
    rank = 0 if "pass_at_" in name else 1 if "_at_" in name else 2
    return rank, [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
