"""The results of `g2rl evaluate` of several models as one table, in the layout of the paper: Markdown or LaTeX.

A second table has the differences to the first model: paired by problem, because all models answer the same problems.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_g2rl.config.benchmark import DISTINCT
from megatron_g2rl.errors import UserError

SUMMARY = "summary.json"
RESAMPLES, TAIL = 2000, 2.5
"""Samples of the bootstrap over problems, and percent on each side of the interval."""
FORMATS = (".md", ".tex")


@dataclass(frozen=True)
class Result:
    """One model on one benchmark."""

    model: str
    benchmark: str
    metrics: Mapping[str, float]
    """Accuracies by name, such as `pass_at_1`."""
    per_problem: Mapping[str, Mapping[int, float]]
    """Accuracies of each problem, by its id."""


@dataclass(frozen=True)
class Table:
    """Cells of text under two rows of headings."""

    title: str
    columns: tuple[tuple[str, str], ...]
    """(benchmark, metric) of each column."""
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """(model, cells)."""


def read_results(folders: Sequence[Path]) -> list[Result]:
    """The results in these folders and below them; models in the order of the folders, then of their names.

    Raises:
        UserError: a folder has none, a summary is corrupt, or one model has two results on a benchmark.
    """
    results: dict[tuple[str, str], Result] = {}
    for folder in folders:
        files = sorted(folder.rglob(SUMMARY)) if folder.is_dir() else []
        if not files:
            raise UserError(f"{folder} has no {SUMMARY}: give folders that g2rl evaluate wrote")
        for file in files:
            result = _read(file)
            if (result.model, result.benchmark) in results:
                raise UserError(f"{file}: there are two results of {result.model} on {result.benchmark}")
            results[result.model, result.benchmark] = result
    return list(results.values())


def _read(file: Path) -> Result:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        names = [name for name in content["metrics"] if "_at_" in name]
        ids = content["problem_ids"]
        values = {name: dict(zip(ids, map(float, content["per_problem"][name]), strict=True)) for name in names}
        metrics = {name: float(content["metrics"][name]) for name in names}
        return Result(str(content["model"]), str(content["benchmark"]), metrics, values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not the summary of an evaluation: {error!r}") from error


def accuracy_table(results: Sequence[Result]) -> Table:
    """Accuracies in percent of all models on all benchmarks; the best of a column is marked with a star."""
    columns, best = _columns(results), {}
    for benchmark, metric in columns:
        values = [r.metrics[metric] for r in results if r.benchmark == benchmark and metric in r.metrics]
        best[benchmark, metric] = max(values) if len(values) > 1 else None

    def cell(result: Result | None, column: tuple[str, str]) -> str:
        if result is None or column[1] not in result.metrics:
            return "-"
        value = result.metrics[column[1]]
        shown = f"{value:.2f}" if column[1].startswith(DISTINCT) else f"{100 * value:.1f}"
        return f"{shown}{'*' if value == best[column] else ''}"

    title = f"Accuracy in percent{_note(columns)}; *: best of the column"
    return Table(title, columns, tuple(_rows(results, columns, cell)))


def difference_table(results: Sequence[Result]) -> Table | None:
    """Differences to the first model in points, with 95% intervals by bootstrap over problems; None for one model.

    Compared are the problems that both models have; a star marks an interval without 0.
    """
    first = results[0].model
    others = [result for result in results if result.model != first]
    if not others:
        return None
    base = {result.benchmark: result for result in results if result.model == first}
    columns = tuple(column for column in _columns(others) if column[0] in base)

    def cell(result: Result | None, column: tuple[str, str]) -> str:
        own, other = (side and side.per_problem.get(column[1]) for side in (result, base[column[0]]))
        shared = sorted(own.keys() & other.keys()) if own and other else []
        if not shared:
            return "-"
        scale, digits = (1, 2) if column[1].startswith(DISTINCT) else (100, 1)
        differences = scale * np.array([own[problem] - other[problem] for problem in shared])
        draws = np.random.default_rng(0).multinomial(len(shared), [1 / len(shared)] * len(shared), RESAMPLES)
        low, high = np.percentile(draws @ differences / len(shared), [TAIL, 100 - TAIL])
        star = "*" if low > 0 or high < 0 else ""
        return f"{differences.mean():+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}){star}"

    title = (
        f"Difference to {first} in points{_note(columns)}, 95% interval by paired bootstrap over problems; *: without 0"
    )
    return Table(title, columns, tuple(_rows(others, columns, cell)))


def _note(columns: Sequence[tuple[str, str]]) -> str:
    """The unit of the columns that are no accuracies."""
    return ", number of distinct solutions" if any(metric.startswith(DISTINCT) for _, metric in columns) else ""


def _columns(results: Sequence[Result]) -> tuple[tuple[str, str], ...]:
    """(benchmark, metric) in order of appearance."""
    return tuple(dict.fromkeys((result.benchmark, metric) for result in results for metric in result.metrics))


def _rows(results, columns, cell) -> Iterator[tuple[str, tuple[str, ...]]]:
    by_place = {(result.model, result.benchmark): result for result in results}
    for model in dict.fromkeys(result.model for result in results):
        yield model, tuple(cell(by_place.get((model, column[0])), column) for column in columns)


def markdown(tables: Sequence[Table]) -> str:
    """Markdown tables with one row of headings."""
    parts = []
    for table in tables:
        heading = ["Model", *(f"{benchmark} {_metric(metric)}" for benchmark, metric in table.columns)]
        lines = [_markdown_line(heading), "|---" * len(heading) + "|"]
        lines += [_markdown_line([model, *cells]) for model, cells in table.rows]
        parts.append("\n".join([table.title, "", *lines]))
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[Table]) -> str:
    """LaTeX tables with benchmarks above their metrics; needs the package booktabs."""
    parts = []
    for table in tables:
        spans: dict[str, int] = {}
        for benchmark, _ in table.columns:
            spans[benchmark] = spans.get(benchmark, 0) + 1
        above = [rf"\multicolumn{{{count}}}{{c}}{{{_escape(name)}}}" for name, count in spans.items()]
        lines = [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule", _latex_line(["", *above])]
        ordered = sorted(range(len(table.columns)), key=lambda i: list(spans).index(table.columns[i][0]))
        lines += [_latex_line(["Model", *(_escape(_metric(table.columns[i][1])) for i in ordered)]), r"\midrule"]
        lines += [_latex_line([_escape(model), *(_escape(cells[i]) for i in ordered)]) for model, cells in table.rows]
        parts.append("\n".join([f"% {table.title}", *lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def _metric(name: str) -> str:
    return name.replace("_at_", "@")


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escape(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", "/")).replace("~", r"\textasciitilde{}")


def write_table(folders: Sequence[Path], output: Path) -> None:
    """Write the table of these results to `output`, in the format of its suffix.

    Raises:
        UserError: there are no results, the suffix is not one of `FORMATS`, or `output` cannot be written.
    """
    if output.suffix not in FORMATS:
        raise UserError(f"--output {output}: a table is a {' or '.join(FORMATS)} file; name one, such as table.md")
    results = read_results(folders)
    tables = [table for table in (accuracy_table(results), difference_table(results)) if table is not None]
    text = (markdown if output.suffix == ".md" else latex)(tables)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}; name another file") from error
