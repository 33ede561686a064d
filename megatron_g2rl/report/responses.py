"""Responses of a run that the page shows: which ones, cut to a length that can be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_g2rl.report.runs import Run, finite
from megatron_g2rl.report.series import show

LONGEST = 1500
"""Characters of a text that are shown."""
PER_STEP = 4
"""Responses of one step that are shown, in the order of the file."""


@dataclass(frozen=True)
class Sample:
    """One response as the page shows it."""

    prompt: str
    response: str
    answer: str
    right: bool
    figures: str
    """Reward, ν and shaped reward."""


@dataclass(frozen=True)
class StepSamples:
    """Responses of one step."""

    step: str
    samples: list[Sample]


def sample_responses(run: Run) -> list[StepSamples]:
    """The first responses in the file of its first and of its last step: no others are looked at."""
    steps: dict[str, list[dict[str, Any]]] = {}
    for row in run.responses:
        steps.setdefault(_text(row.get("step", "?")), []).append(row)
    ends = list(dict.fromkeys([*list(steps)[:1], *list(steps)[-1:]]))
    return [StepSamples(step, [_sample(row) for row in steps[step][:PER_STEP]]) for step in ends]


def _sample(row: dict[str, Any]) -> Sample:
    named = (("reward", "reward"), ("exploration score ν", "score"), ("shaped reward", "shaped"))
    figures = [f"{name} {show(float(row[key]))}" for name, key in named if finite(row.get(key))]
    if row.get("finish_reason") == "length":
        figures.append("stopped by the length limit")
    return Sample(
        prompt=_text(row.get("prompt", "")),
        response=_text(row.get("response", "")),
        answer=_text(row.get("answer", "")),
        right=_is_correct(row),
        figures=" · ".join(figures),
    )


def _is_correct(row: dict[str, Any]) -> bool:
    """As the run says; runs of older versions wrote rewards alone, and above 0 was correct."""
    if isinstance(row.get("correct"), bool):
        return row["correct"]
    return finite(row.get("reward")) and row["reward"] > 0


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"
