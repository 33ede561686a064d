"""Describes problems of a run in plain sentences, from the means of its metrics over the last steps. No torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping

WINDOW = 10
"""Steps over which metrics are averaged."""


class RecentHealth:
    """The sentences of `health` about the last `WINDOW` steps of a run."""

    def __init__(self) -> None:
        self._steps: deque[Mapping[str, float]] = deque(maxlen=WINDOW)

    def add(self, metrics: Mapping[str, float]) -> list[str]:
        """Add the metrics of a step; returns the sentences."""
        self._steps.append(metrics)
        return health(self._steps)


def health(steps: Iterable[Mapping[str, float]]) -> list[str]:
    """Sentences on what deserves attention in these steps; empty if nothing does.

    Args:
        steps: metrics of consecutive steps, named as in `table.py`; missing and non-finite values are ignored.
    """
    values: dict[str, list[float]] = {}
    for metrics in steps:
        for name, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                values.setdefault(name, []).append(float(value))
    mean = {name: sum(each) / len(each) for name, each in values.items()}
    return [sentence for check in _CHECKS if (sentence := check(mean))]


def _no_signal(mean: Mapping[str, float]) -> str:
    used, passed = mean.get("reward/groups_used_fraction", 1.0), mean.get("reward/pass_rate", 0.5)
    if used >= 0.5:
        return ""
    if 0.3 <= passed <= 0.7:
        why = "each problem is either too easy or too hard"
    else:
        why = f"the problems are too {'hard' if passed < 0.3 else 'easy'}"
    return f"{1 - used:.0%} of the groups have equal rewards and give no gradient: {why}"


def _truncated(mean: Mapping[str, float]) -> str:
    truncated = mean.get("response/truncated_fraction", 0.0)
    return f"{truncated:.0%} of the responses reach rollout.max_response_tokens" if truncated > 0.2 else ""


def _unparsed(mean: Mapping[str, float]) -> str:
    unparsed = mean.get("response/unparsed_fraction", 0.0) - mean.get("response/truncated_fraction", 0.0)
    return f"{unparsed:.0%} of the responses are complete but have no final answer" if unparsed > 0.2 else ""


def _loops(mean: Mapping[str, float]) -> str:
    loops = mean.get("response/repetitive_fraction", 0.0)
    return f"{loops:.0%} of the responses end in a loop" if loops > 0.05 else ""


def _confident(mean: Mapping[str, float]) -> str:
    confident = mean.get("response/confidently_incorrect_fraction", 0.0)
    return (
        f"for {confident:.0%} of the problems, most responses agree on an incorrect answer" if confident > 0.3 else ""
    )


def _mismatch(mean: Mapping[str, float]) -> str:
    kl = mean.get("mismatch/kl", 0.0)
    return f"rollout engine and trainer disagree: KL {kl:.2g} nats per token" if kl > 0.01 else ""


def _timeouts(mean: Mapping[str, float]) -> str:
    timeouts, crashes = mean.get("reward/timeouts", 0.0), mean.get("reward/worker_crashes", 0.0)
    if timeouts + crashes < 1:
        return ""
    return f"{timeouts:.0f} reward calls per step exceed reward.deadline_s, {crashes:.0f} crash their worker"


def _skipped(mean: Mapping[str, float]) -> str:
    skipped = mean.get("update/skipped", 0.0)
    return f"{skipped:.1f} updates per step are skipped: loss or gradient is not finite" if skipped else ""


def _rollout(mean: Mapping[str, float]) -> str:
    step, rollout = mean.get("time/step_s", math.inf), mean.get("time/rollout_s", 0.0)
    return (
        f"the trainer is idle for {rollout / step:.0%} of a step, during the rollout"
        if rollout > 0.8 * step > 0
        else ""
    )


_CHECKS = (
    *(_no_signal, _truncated, _unparsed, _loops, _confident),
    *(_mismatch, _timeouts, _skipped, _rollout),
)
