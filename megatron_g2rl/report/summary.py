"""The summary at the top of the report: the runs, their results, and what these do and do not show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_g2rl.report.runs import Run
from megatron_g2rl.report.series import TAIL, mean, numbers, show
from megatron_g2rl.report.settings import ABSENT, differing, same_setting_groups, setting, setting_rows

PASS_RATE, PASS_AT_1 = "reward/pass_rate", "evaluation/pass_at_1"
METHODS = {"gradient": "G2RL", "none": "GRPO"}
"""Display names of the values of `exploration.method`."""


@dataclass(frozen=True)
class RunLine:
    """One run in the table at the top."""

    label: str
    method: str
    seed: str
    steps: str
    pass_rate: str
    """Mean of the first ten and of the last ten steps."""
    evaluation: str
    """pass@1 of the first and the last evaluation; empty if no run has evaluations."""
    step_time: str


@dataclass(frozen=True)
class Summary:
    """Content of the summary."""

    lines: list[RunLine]
    sentences: list[str]
    tail: str
    """The compared steps, such as "70-79"."""


def summarize(runs: Sequence[Run]) -> Summary:
    """The summary, which compares the last ten steps that all runs have in common."""
    tail = common_tail(runs)
    evaluated = any(PASS_AT_1 in run.names() for run in runs)
    sentences = [*_comparison(runs, tail), *_evidence(runs), *_cautions(runs)]
    title = "" if not tail else f"{tail[0]}\N{EN DASH}{tail[-1]}" if len(tail) > 1 else str(tail[0])
    return Summary([_line(run, evaluated) for run in runs], sentences, title)


def common_tail(runs: Sequence[Run]) -> list[int]:
    """The last ten steps that all runs have; empty if there is no common step."""
    return sorted(set.intersection(*(set(run.steps) for run in runs)))[-TAIL:]


def _line(run: Run, evaluated: bool) -> RunLine:
    steps, rates = run.series(PASS_RATE)
    planned = run.settings.get("trainer.steps")
    accuracy = numbers(*run.series(PASS_AT_1))
    return RunLine(
        label=run.label,
        method=METHODS.get(setting(run, "exploration.method"), setting(run, "exploration.method")),
        seed=setting(run, "run.seed"),
        steps=f"{len(steps):,} of {planned:,}" if isinstance(planned, int) else f"{len(steps):,}",
        pass_rate=f"{show(mean(rates[:TAIL]), True)} → {show(mean(rates[-TAIL:]), True)}",
        evaluation=f"{show(accuracy.first, True)} → {show(accuracy.last, True)}" if evaluated else "",
        step_time=f"{show(mean(run.series('time/step_s')[1]))} s",
    )


def _comparison(runs: Sequence[Run], tail: list[int]) -> list[str]:
    if len(runs) == 1:
        return []
    if not tail:
        return ["The runs have no step in common, so their final steps cannot be compared."]
    ends = [[run.metrics[step].get(PASS_RATE, math.nan) for step in tail] for run in runs]
    present = [(mean(end), numbers(tail, end).tail_deviation, run.label) for run, end in zip(runs, ends, strict=True)]
    present = [entry for entry in present if not math.isnan(entry[0])]
    if len(present) < 2:
        return []
    high, low = max(present), min(present)
    scatter = max(deviation for _, deviation, _ in present)
    gap = high[0] - low[0]
    steps = f"steps {tail[0]}\N{EN DASH}{tail[-1]}" if len(tail) > 1 else f"step {tail[0]} alone"
    small = " This is less than the variation of the pass rate from step to step." if gap < scatter else ""
    few = f" These are only {len(tail)} steps: too few for a comparison." if len(tail) < TAIL else ""
    return [
        f"Over {steps}, which all runs have, the pass rate is highest in {high[2]} "
        f"({show(high[0], True)}) and lowest in {low[2]} ({show(low[0], True)}), {100 * gap:.1f} percentage points "
        f"apart; within a run, these steps vary by up to {100 * scatter:.1f} points (standard deviation).{small}{few}"
    ]


def _evidence(runs: Sequence[Run]) -> list[str]:
    """Which conclusions the number of seeds allows."""
    groups = same_setting_groups(runs)
    seeds = [len({setting(runs[i], "run.seed") for i in group}) for group in groups]
    sentences = []
    for group, count in zip(groups, seeds, strict=True):
        if count > 1:
            ends = [numbers(*runs[i].series(PASS_RATE)).tail_mean for i in group]
            ends = [end for end in ends if not math.isnan(end)]
            values = f": {show(fmean(ends), True)} on average, {show(min(ends), True)} to {show(max(ends), True)}"
            sentences.append(
                f"{', '.join(runs[i].label for i in group)} differ only in the seed ({count} seeds); pass rate "
                f"of their last {TAIL} steps{values if ends else ' unknown'}."
            )
    if min(seeds) == 1:
        which = "This run" if len(runs) == 1 else "Every setting" if max(seeds) == 1 else "At least one setting"
        verb = "has" if len(runs) > 1 else "used"
        sentences.append(
            f"{which} {verb} one seed. One seed is no evidence that a setting is better or worse: another seed of the "
            "same setting may change the result by more than the difference seen here."
        )
    return sentences


def _cautions(runs: Sequence[Run]) -> list[str]:
    sentences = []
    keys = [row.key for row in differing(setting_rows(runs)) if row.key != "run.seed"]
    if len(keys) > 1:
        sentences.append(
            f"The runs differ in {len(keys)} settings ({', '.join(keys[:6])}{' and more' if len(keys) > 6 else ''}): a "
            "difference between them cannot be attributed to any single one."
        )
    elif keys:
        seeds = "Apart from the seed, the" if len({setting(run, "run.seed") for run in runs}) > 1 else "The"
        sentences.append(f"{seeds} runs differ in one setting only: {keys[0]}.")
    for run in runs:
        planned = run.settings.get("trainer.steps")
        if isinstance(planned, int) and len(run.steps) < planned:
            sentences.append(f"{run.label} has finished {len(run.steps):,} of its {planned:,} steps.")
        if run.broken_lines:
            sentences.append(f"{run.label}: {run.broken_lines} lines of its files could not be read and are omitted.")
        if setting(run, "exploration.method") == ABSENT:
            sentences.append(f"{run.label} has no readable config.yaml: its settings are unknown.")
    return sentences
