"""Files of an evaluation: `responses.parquet` with every response, and `summary.json` with metrics and intervals.

Both are complete or absent, and depend on nothing but the responses: an interrupted and resumed evaluation writes the
same bytes as an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_g2rl.config.benchmark import Benchmark
from megatron_g2rl.errors import UserError
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
            "form": form or None,
            "finish_reason": response.finish_reason,
            "tokens": len(response.token_ids),
            "repetitive": ends_in_loop(response.token_ids),
            "logprob": sum(response.logprobs),
            "seed": response.seed,
            "prompt_token_ids": group.prompt.token_ids,
            "token_ids": response.token_ids,
        }
        for group, answers, flags, forms in zip(
            evaluation.groups,
            evaluation.answers,
            evaluation.correct,
            evaluation.forms or [(None,) * len(row) for row in evaluation.correct],
            strict=True,
        )
        for index, (response, answer, correct, form) in enumerate(
            zip(group.responses, answers, flags, forms, strict=True)
        )
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
        "form": _TEXT,
        "finish_reason": _TEXT,
        "tokens": pyarrow.int32(),
        "repetitive": pyarrow.bool_(),
        "logprob": pyarrow.float64(),
        "seed": pyarrow.int64(),
        "prompt_token_ids": pyarrow.list_(pyarrow.int32()),
        "token_ids": pyarrow.list_(pyarrow.int32()),
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


@dataclass(frozen=True)
class ProblemResponses:
    """The responses of an evaluation to one problem."""

    problem_id: int
    prompt: tuple[int, ...]
    """Token ids of the prompt."""
    responses: tuple[tuple[int, ...], ...]
    """Token ids of each response."""
    texts: tuple[str, ...]
    correct: tuple[bool, ...]
    logprobs: tuple[float, ...]
    """Sum of the log-probs of each response's tokens (nats), by the rollout engine."""


def read_responses(folder: Path) -> list[ProblemResponses]:
    """The responses of a complete evaluation in `folder`, problem after problem.

    Raises:
        UserError: the file is missing, corrupt, or of a version without token ids.
    """
    file, needed = folder / RESPONSES, ["problem_id", "prompt_token_ids", "token_ids", "response", "correct", "logprob"]
    try:
        rows = pyarrow.parquet.read_table(file, columns=needed).to_pylist()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} cannot be used ({reason}): run g2rl evaluate again with another --output") from error
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["problem_id"], []).append(row)
    return [
        ProblemResponses(
            problem,
            tuple(members[0]["prompt_token_ids"]),
            tuple(tuple(row["token_ids"]) for row in members),
            *(tuple(row[name] for row in members) for name in ("response", "correct", "logprob")),
        )
        for problem, members in groups.items()
    ]


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a complete evaluation in `folder`; None without one."""
    file = folder / SUMMARY
    return json.loads(file.read_text()) if file.is_file() else None
