"""Files of an evaluation: `responses.parquet` with every response, and `summary.json` with metrics and intervals.

Both are complete or absent, and depend on nothing but the responses: an interrupted and resumed evaluation writes the
same bytes as an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_g2rl.config.benchmark import Benchmark
from megatron_g2rl.evaluation.summary import CONFIDENCE, RESAMPLES, Evaluation, ends_in_loop, intervals

RESPONSES, SUMMARY = "responses.parquet", "summary.json"


def response_table(evaluation: Evaluation) -> pyarrow.Table:
    """One row per response: problem, reference, text, final answer and how it was scored."""
    rows = [
        {
            "problem_id": group.prompt.id,
            "source": group.prompt.source,
            "prompt": group.prompt.text,
            "reference": group.prompt.answer,
            "index": index,
            "response": response.text,
            "answer": answer,
            "correct": correct,
            "finish_reason": response.finish_reason,
            "tokens": len(response.token_ids),
            "repetitive": ends_in_loop(response.token_ids),
            "logprob": sum(response.logprobs),
            "seed": response.seed,
        }
        for group, answers, flags in zip(evaluation.groups, evaluation.answers, evaluation.correct, strict=True)
        for index, (response, answer, correct) in enumerate(zip(group.responses, answers, flags, strict=True))
    ]
    return pyarrow.Table.from_pylist(rows, _SCHEMA)


_TEXT = pyarrow.string()
_SCHEMA = pyarrow.schema(
    {
        "problem_id": pyarrow.int64(),
        "source": _TEXT,
        "prompt": _TEXT,
        "reference": _TEXT,
        "index": pyarrow.int32(),
        "response": _TEXT,
        "answer": _TEXT,
        "correct": pyarrow.bool_(),
        "finish_reason": _TEXT,
        "tokens": pyarrow.int32(),
        "repetitive": pyarrow.bool_(),
        "logprob": pyarrow.float64(),
        "seed": pyarrow.int64(),
    }
)


def summary(evaluation: Evaluation, benchmark: Benchmark, about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        evaluation: scored responses.
        benchmark: settings and metrics.
        about: what was evaluated; its entries come first.
    """
    per_problem = evaluation.per_problem(benchmark.metrics)
    return {
        **about,
        "settings": benchmark.model_dump(mode="json"),
        "problems": len(evaluation.groups),
        "responses": sum(len(group.responses) for group in evaluation.groups),
        "metrics": evaluation.metrics(benchmark.metrics),
        "intervals": {name: list(bounds) for name, bounds in intervals(per_problem).items()},
        "interval_method": f"bootstrap over problems, {RESAMPLES} samples, {CONFIDENCE:.0%} percentile interval",
        "problem_ids": [group.prompt.id for group in evaluation.groups],
        "per_problem": per_problem,
    }


def write_results(folder: Path, evaluation: Evaluation, content: Mapping[str, Any]) -> None:
    """Write both files; the summary last, so that it marks a complete evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{RESPONSES}"
    pyarrow.parquet.write_table(response_table(evaluation), partial)
    partial.replace(folder / RESPONSES)
    partial = folder / f".{SUMMARY}"
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    partial.replace(folder / SUMMARY)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a complete evaluation in `folder`; None without one."""
    file = folder / SUMMARY
    return json.loads(file.read_text()) if file.is_file() else None
