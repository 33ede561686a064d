"""What the report draws: every chart with its metrics, what it means and which way is better.

A chart none of whose metrics is in any run is left out. Metrics that no chart names stand in a table at the end;
`evaluation/*` and `time/*_s` are taken as they come.
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
    """What tells it from the other lines of its chart."""


@dataclass(frozen=True)
class Chart:
    """One plot and its table."""

    title: str
    lines: tuple[Line, ...]
    note: str
    """What is drawn, with its unit, and how to read it."""
    better: Literal["higher", "lower"] | None = None
    """Which extreme is the best one; None: the table shows the range."""
    percent: bool = False
    log: bool = False
    reference: float | None = None
    """Value of a thin horizontal line."""


@dataclass(frozen=True)
class Section:
    """Charts under one heading."""

    title: str
    note: str
    charts: tuple[Chart, ...]


LEARNING = Section(
    "Learning",
    "On the problems of each step, as they were sampled for training.",
    (
        Chart(
            "Pass rate",
            (Line("reward/pass_rate"),),
            "Share of sampled responses that are right.",
            better="higher",
            percent=True,
        ),
        Chart(
            "Reward",
            (Line("reward/mean", "as judged"), Line("reward/shaped_mean", "shaped")),
            "Mean reward of a response, before and after the exploration term scaled it.",
            better="higher",
        ),
        Chart(
            "Groups that train",
            (Line("reward/groups_used"),),
            "Share of the groups whose shaped rewards differ; groups with equal ones have no gradient.",
            percent=True,
        ),
    ),
)

DIRECTIONS = Section(
    "Directions and exploration",
    "Each response is represented by the direction in which it would move the model. These charts compare the "
    "responses to one problem by their directions: this is what G2RL rewards and GRPO does not look at.",
    (
        Chart(
            "Gradient cosine",
            (Line("geometry/mean_cosine"),),
            "Mean cosine between the directions of two responses to one problem: 1 means the same update, 0 unrelated, "
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
            "above the upper one.",
            reference=0.0,
        ),
        Chart(
            "Opposed and unrelated pairs",
            (Line("geometry/negative_share", "opposed"), Line("geometry/orthogonal_share", "unrelated")),
            "Share of the pairs with a cosine below 0, and of those with a cosine between −0.1 and 0.1.",
            percent=True,
        ),
        Chart(
            "Effective rank",
            (Line("geometry/effective_rank"),),
            "Number of different directions in a group: 1 when all responses would move the model alike, at most the "
            "group size.",
        ),
        Chart(
            "Exploration score by correctness",
            (Line("exploration/score_correct", "right"), Line("exploration/score_wrong", "wrong")),
            "Mean ν: 1 for a response whose direction no other one has, 0 for one that repeats the others.",
        ),
    ),
)

POLICY = Section(
    "Policy",
    "How the model's behaviour changes.",
    (
        Chart(
            "Entropy",
            (Line("policy/entropy"),),
            "Mean entropy of the next token (nats). A fall to near 0 means that sampling no longer finds anything new.",
        ),
        Chart(
            "Response length",
            (Line("response/tokens_mean", "mean"), Line("response/tokens_max", "longest")),
            "Tokens per response.",
        ),
        Chart("Cut responses", (Line("response/cut_share"),), "Share stopped by the length limit.", percent=True),
        Chart(
            "Distance from the reference",
            (Line("update/kl"),),
            "KL divergence from the model before training (nats per token), as the loss estimates it.",
        ),
        Chart("Gradient norm", (Line("update/gradient_norm"),), "Before clipping, mean over the updates of a step."),
        Chart(
            "Clipped tokens",
            (Line("update/clip_fraction_high", "ratio too high"), Line("update/clip_fraction_low", "ratio too low")),
            "Share of the tokens whose probability ratio left the clipping range.",
            percent=True,
        ),
    ),
)

MISMATCH = Section(
    "Sampler against trainer",
    "The engine that samples and the model that trains should give every token the same probability.",
    (
        Chart(
            "Log-prob difference",
            (Line("mismatch/logprob_difference_mean", "mean"), Line("mismatch/logprob_difference_max", "largest")),
            "Absolute difference per token (nats), on a logarithmic scale.",
            better="lower",
            log=True,
        ),
        Chart(
            "KL divergence", (Line("mismatch/kl"),), "Sampler from trainer, nats per token.", better="lower", log=True
        ),
        Chart(
            "Truncated weights",
            (Line("mismatch/truncated_share"),),
            "Share of the tokens whose importance weight hit its cap.",
            better="lower",
            percent=True,
        ),
    ),
)

COST = Section(
    "Time",
    "Wall-clock time of the machine each run was on; other work on that machine slows it down.",
    (
        Chart("Step time", (Line("time/step_s"),), "Seconds per step.", better="lower"),
        Chart(
            "Throughput",
            (Line("throughput/response_tokens_per_s"),),
            "Response tokens per second of the whole step, not of sampling alone.",
            better="higher",
        ),
        Chart(
            "What exploration adds",
            (
                Line("cost/features_s", "features Φ"),
                Line("cost/reduce_s", "their sum over ranks"),
                Line("cost/shaping_s", "scores and rewards"),
            ),
            "Seconds per step. A lower bound: measured inside the computation. Φ is part of the score pass, which GRPO "
            "without Φ does not need for a step's first update; where Φ comes from the sampler's most probable tokens, "
            "the sampler's time for these is not in it.",
            better="lower",
        ),
        Chart(
            "What exploration adds to one response",
            (Line("cost/per_response_ms", "per response"), Line("cost/per_group_ms", "per group")),
            "All three together, in milliseconds.",
            better="lower",
        ),
        Chart(
            "Share of exploration",
            (Line("cost/step_share"),),
            "The same as a share of the whole step.",
            better="lower",
            percent=True,
        ),
    ),
)


def sections(names: Iterable[str]) -> list[Section]:
    """The sections to draw for runs that have these metrics; charts and lines without a metric are left out.

    Time per phase belongs to the section `COST`, which is there when any phase was timed.
    """
    names = set(names)
    wanted = [LEARNING, evaluation(names), DIRECTIONS, POLICY, MISMATCH, COST]
    found = [Section(s.title, s.note, tuple(c for c in (_present(c, names) for c in s.charts) if c)) for s in wanted]
    timed = any(map(is_phase, names))
    return [section for section in found if section.charts or (timed and section.title == COST.title)]


EVALUATION_NOTES = {
    "pass_at_1$": "Share of the answers that are right, mean over the problems.",
    "pass_at_": "Share of the problems that at least one of so many answers solves.",
    "majority": "Share of the problems whose most frequent answer is right.",
    "tokens_mean": "Tokens per answer.",
    "cut_share": "Share of the answers stopped by the length limit.",
    "timeouts": "Answers judged wrong because judging them took too long.",
}


def evaluation(names: set[str]) -> Section:
    """A chart for every `evaluation/*` metric."""
    charts = []
    for name in sorted((name for name in names if name.startswith(EVALUATION)), key=_evaluation_order):
        what = name.removeprefix(EVALUATION)
        share = what.endswith("share") or any(word in what for word in ("pass", "majority", "accuracy", "_at_"))
        accuracy = share and not what.endswith("share")
        title = what.replace("_at_", "@").replace("_", " ").replace("/", ": ")
        note = next((text for word, text in EVALUATION_NOTES.items() if f"{what}$".startswith(word)), "")
        better = "higher" if accuracy else None
        charts.append(Chart(title[:1].upper() + title[1:], (Line(name),), note, better=better, percent=share))
    return Section(
        "Held-out problems",
        "Problems the run did not train on, asked now and then; step 0 is the model before training.",
        tuple(charts),
    )


def leftover(names: Iterable[str], drawn: Iterable[Section]) -> list[str]:
    """Metrics that stand in no chart."""
    shown = {line.metric for section in drawn for chart in section.charts for line in chart.lines}
    return sorted(name for name in names if name not in shown and not is_phase(name))


def is_phase(name: str) -> bool:
    """Whether a metric is the time of one phase of a step."""
    return name.startswith("time/") and name.endswith("_s") and name != "time/step_s"


def _present(chart: Chart, names: set[str]) -> Chart | None:
    lines = tuple(line for line in chart.lines if line.metric in names)
    return Chart(**{**vars(chart), "lines": lines}) if lines else None


def _evaluation_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """What counts right answers first; pass_at_8 before pass_at_16."""
    parts = name.replace("/", "_").split("_")
    rank = 0 if "pass_at_" in name else 1 if "_at_" in name else 2
    return rank, [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
