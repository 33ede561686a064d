"""Responses shown on the page: selection, and truncation to a readable length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_g2rl.report.runs import Run, finite
from megatron_g2rl.report.series import show

LONGEST = 1500
"""Maximum number of characters shown of a text."""
PER_STEP = 4
"""Maximum number of responses shown per step, in file order."""


@dataclass(frozen=True)
class Sample:
    """One response on the page."""

    prompt: str
    response: str
    answer: str
    correct: bool
    figures: str
    """Reward, ν and shaped reward."""


@dataclass(frozen=True)
class StepSamples:
    """Responses of one step."""

    step: str
    samples: list[Sample]


def sample_responses(run: Run) -> list[StepSamples]:
    """The first responses of the first and the last step in the file."""
    steps: dict[str, list[dict[str, Any]]] = {}
    for row in run.responses:
        steps.setdefault(_text(row.get("step", "?")), []).append(row)
    ends = list(dict.fromkeys([*list(steps)[:1], *list(steps)[-1:]]))
    return [StepSamples(step, [_sample(row) for row in steps[step][:PER_STEP]]) for step in ends]


def _sample(row: dict[str, Any]) -> Sample:
    row = {"novelty": row.get("score")} | row  # the name in older versions
    named = (("reward", "reward"), ("novelty ν", "novelty"), ("shaped reward", "shaped"))
    figures = [f"{name} {show(float(row[key]))}" for name, key in named if finite(row.get(key))]
    if row.get("finish_reason") == "length":
        figures.append("truncated at the length limit")
    return Sample(
        prompt=_text(row.get("prompt", "")),
        response=_text(row.get("response", "")),
        answer=_text(row.get("answer", "")),
        correct=_is_correct(row),
        figures=" · ".join(figures),
    )


def _is_correct(row: dict[str, Any]) -> bool:
    """As recorded; older versions recorded only the reward, and a positive one meant correct."""
    if isinstance(row.get("correct"), bool):
        return row["correct"]
    return finite(row.get("reward")) and row["reward"] > 0


def _text(value: Any) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"
