"""The results of `g2rl evaluate` of several models as one table, in the layout of the paper: Markdown or LaTeX.

Models whose trainings differ only in the seed are one row. A second table has the differences to the baseline: paired
by problem, because all models answer the same problems, and by seed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_g2rl.config.benchmark import DISTINCT
from megatron_g2rl.errors import UserError
from megatron_g2rl.report.intervals import Interval
from megatron_g2rl.report.results import (
    Result,
    ResultGroup,
    accuracy_difference,
    baseline_of,
    group_results,
    read_results,
)

FORMATS = (".md", ".tex")


@dataclass(frozen=True)
class Table:
    """Cells of text under two rows of headings."""

    title: str
    columns: tuple[tuple[str, str], ...]
    """(benchmark, metric) of each column."""
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """(model or setting, cells)."""


def accuracy_table(results: Sequence[Result]) -> Table:
    """Accuracies in percent of all groups on all benchmarks; the best of a column is marked with a star."""
    groups, columns = group_results(results), result_columns(results)
    best = {}
    for column in columns:
        values = [accuracy.mean for group in groups if (accuracy := group.accuracy(*column)) is not None]
        best[column] = max(values) if len(values) > 1 else None

    def cell(group: ResultGroup, column: tuple[str, str]) -> str:
        accuracy = group.accuracy(*column)
        if accuracy is None:
            return "-"
        scale, digits = unit(column[1])
        spread = f" ± {scale * accuracy.half_width:.{digits}f}" if accuracy.is_known else ""
        return f"{scale * accuracy.mean:.{digits}f}{spread}{'*' if accuracy.mean == best[column] else ''}"

    several = any(len(group.models) > 1 for group in groups)
    spread = ", mean over seeds ± half of its 95% t interval" if several else ""
    title = f"Accuracy in percent{_note(columns)}{spread}; *: best of the column"
    return Table(title, columns, _rows(groups, columns, cell))


def difference_table(results: Sequence[Result], baseline: str | None = None) -> Table | None:
    """Differences to the baseline in points, with 95% bootstrap intervals over problems and seeds; None for one group.

    Compared are the problems that both have; a star marks an interval that excludes 0.

    Raises:
        UserError: there is no group with the name `baseline`.
    """
    groups = group_results(results)
    first = groups.pop(baseline_of(groups, baseline))
    if not groups:
        return None
    measured = {benchmark for _, benchmark in first.results}
    others = [result for group in groups for result in group.results.values()]
    columns = tuple(column for column in result_columns(others) if column[0] in measured)

    def cell(group: ResultGroup, column: tuple[str, str]) -> str:
        difference = accuracy_difference(group, first, *column)
        return "-" if difference is None else in_points(difference, column[1])

    sizes = [len(group.models) for group in (first, *groups)]
    over = "problems and seeds" if max(sizes) > 1 else "problems"
    single = "; with one seed, only problems are resampled" if min(sizes) == 1 < max(sizes) else ""
    interval = f"95% interval by paired bootstrap over {over}; *: excludes 0{single}"
    return Table(
        f"Difference to {first.label} in points{_note(columns)}, {interval}", columns, _rows(groups, columns, cell)
    )


def in_points(difference: Interval, metric: str = "") -> str:
    """A difference with its interval: in points, or in the unit of `metric` if that is no accuracy."""
    scale, digits = unit(metric)
    mean, low, high = (scale * value for value in (difference.mean, difference.low, difference.high))
    bounds = f" ({low:+.{digits}f} to {high:+.{digits}f})" if difference.is_known else ""
    return f"{mean:+.{digits}f}{bounds}{'*' if difference.excludes_zero else ''}"


def unit(metric: str) -> tuple[float, int]:
    """Factor and decimals with which a metric is shown: accuracies in percent, numbers of solutions as they are."""
    return (1, 2) if metric.startswith(DISTINCT) else (100, 1)


def _note(columns: Sequence[tuple[str, str]]) -> str:
    """The unit of the columns that are no accuracies."""
    return ", number of distinct solutions" if any(metric.startswith(DISTINCT) for _, metric in columns) else ""


def result_columns(results: Sequence[Result]) -> tuple[tuple[str, str], ...]:
    """(benchmark, metric) in order of appearance."""
    return tuple(dict.fromkeys((result.benchmark, metric) for result in results for metric in result.metrics))


def _rows(
    groups: Sequence[ResultGroup],
    columns: Sequence[tuple[str, str]],
    cell: Callable[[ResultGroup, tuple[str, str]], str],
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((group.label, tuple(cell(group, column) for column in columns)) for group in groups)


def markdown(tables: Sequence[Table]) -> str:
    """Markdown tables with one row of headings."""
    parts = []
    for table in tables:
        heading = ["Model", *(f"{benchmark} {_metric(metric)}" for benchmark, metric in table.columns)]
        lines = [markdown_line(heading), "|---" * len(heading) + "|"]
        lines += [markdown_line([model, *cells]) for model, cells in table.rows]
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


def markdown_line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells).replace("±", r"$\pm$") + r" \\"


def _escape(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", "/")).replace("~", r"\textasciitilde{}")


def write_table(folders: Sequence[Path], output: Path, baseline: str | None = None) -> None:
    """Write the table of these results to `output`, in the format of its suffix.

    Raises:
        UserError: there are no results or no such baseline, the suffix is not one of `FORMATS`, or `output` cannot be
            written.
    """
    if output.suffix not in FORMATS:
        raise UserError(f"--output {output}: a table is a {' or '.join(FORMATS)} file; name one, such as table.md")
    results = read_results(folders)
    tables = [table for table in (accuracy_table(results), difference_table(results, baseline)) if table is not None]
    text = (markdown if output.suffix == ".md" else latex)(tables)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}; name another file") from error
