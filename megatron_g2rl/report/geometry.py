"""Pages of `g2rl analyze`: a table and histograms of the cosines of pairs of responses, by model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_g2rl import __version__
from megatron_g2rl.report.plots import color_of, dash_of, draw_steps

HERE = Path(__file__).parent
KINDS = {
    "all": "all pairs",
    "both_correct": "both correct",
    "mixed": "one correct",
    "both_incorrect": "both incorrect",
}
"""Kinds of pairs in words."""
VECTORS = {"gradient": "update directions Φ", "semantic": "text embeddings"}
"""What the cosines are of."""
COLUMNS = ("Pairs", "Mean cosine", "Negative", "Unrelated", "Median", "5% to 95%")
BINS = [-1 + step / 20 for step in range(41)]
"""Bounds of the bins of `evaluation.geometry_study`."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a model, what the cosines are of, and a kind of pairs."""

    number: int
    """Index of the model."""
    label: str
    vectors: str
    kind: str
    cells: tuple[str, ...]


def rows(found: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The table of all results of `g2rl analyze`."""
    table = []
    for number, result in enumerate(found):
        for vectors, name in VECTORS.items():
            for kind, words in KINDS.items():
                if vectors in result:
                    table.append(Row(number, result["label"], name, words, _cells(result[vectors][kind])))
    return table


def _cells(part: Mapping[str, Any]) -> tuple[str, ...]:
    if not part["pairs"]:
        return ("0", *("-" for _ in COLUMNS[1:]))
    percentiles, bounds = part["percentiles"], part["intervals"]
    low, high = bounds["mean"]
    fewest, most = bounds["negative_fraction"]
    return (
        f"{part['pairs']:,}",
        f"{part['mean']:.3f} ({low:.3f} to {high:.3f})",
        f"{part['negative_fraction']:.1%} ({fewest:.1%} to {most:.1%})",
        f"{part['orthogonal_fraction']:.1%}",
        f"{percentiles['50']:.3f}",
        f"{percentiles['5']:.2f} to {percentiles['95']:.2f}",
    )


def ranks(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """(label, effective rank of all, correct, and incorrect responses; fraction correct) of each result."""
    return [
        (
            result["label"],
            (
                *(_number(result["effective_rank"].get(kind)) for kind in ("all", "correct", "incorrect")),
                f"{result['correct_fraction']:.1%}",
                f"{result['responses']:,} to {result['problems']:,} problems",
                f"{result['logprob_difference']:.2g}",
            ),
        )
        for result in found
    ]


RANK_COLUMNS = (
    "Effective rank: all",
    "Correct",
    "Incorrect",
    "Fraction correct",
    "Responses",
    "Log-prob difference, nats per token",
)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The tables as Markdown."""
    lines = [_line(("Model", "Cosines of", "Pairs of responses", *COLUMNS)), _line("---" for _ in range(9))]
    lines += [_line((row.label, row.vectors, row.kind, *row.cells)) for row in rows(found)]
    lines += ["", _line(("Model", *RANK_COLUMNS)), _line("---" for _ in range(7))]
    lines += [_line((label, *cells)) for label, cells in ranks(found)]
    return "\n".join([*lines, "", f"Intervals: {found[0]['interval_method']}." if found else "", ""])


def _line(cells) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def page(found: Sequence[Mapping[str, Any]]) -> str:
    """The page as HTML: no scripts or external resources; all text from the results is escaped."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def histogram(vectors: str, kind: str) -> Markup:
        heights = [result.get(vectors, {}).get(kind, {}).get("histogram", []) for result in found]
        return Markup(draw_steps(BINS, heights, "cosine", f"{VECTORS[vectors]}, {KINDS[kind]}: histogram of cosines"))

    return environment.get_template("geometry.html.jinja").render(
        found=found,
        rows=rows(found),
        ranks=ranks(found),
        columns=COLUMNS,
        rank_columns=RANK_COLUMNS,
        vectors={name: words for name, words in VECTORS.items() if any(name in result for result in found)},
        kinds=KINDS,
        histogram=histogram,
        color_of=color_of,
        dash_of=dash_of,
        style=Markup((HERE / "page.css").read_text()),
        version=__version__,
    )


def write_pages(output: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Write geometry.md and geometry.html."""
    (output / "geometry.md").write_text(markdown(found), encoding="utf-8", errors="replace")
    (output / "geometry.html").write_text(page(found), encoding="utf-8", errors="replace")
