"""Draw the README's figure from two finished runs, with the charts and colors of `g2rl report`.

    make quickstart
    python tools/readme_figure.py runs/quickstart_grpo runs/quickstart_g2rl docs/images/quickstart.svg

The charts are those of the report. As on its page, dark mode inverts the lightness of all colors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_g2rl.report.plots import COLORS, Curve, draw_curves
from megatron_g2rl.report.runs import Run, read_runs, short_labels
from megatron_g2rl.report.series import smoothing_window

CHARTS = (
    ("reward/pass_rate", "Correct responses, training problems", True),
    ("geometry/effective_rank", "Different directions in a group of 8 (effective rank)", False),
)
"""Metric, title, whether it is a percentage."""
STYLE = (
    ":root { font-family: sans-serif; font-size: 13px; fill: #1d1f23; } line { stroke-width: 3; } "
    ".title { font-weight: 600; } "
    "@media (prefers-color-scheme: dark) { :root { filter: invert(.86) hue-rotate(180deg); } }"
)
WIDTH, HEIGHT, TITLE, LEGEND = 404, 209, 26, 26
"""Size of a chart of `draw_curves`, and heights of the text above and below it, in pixels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs=2)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.output.write_text(figure(read_runs(arguments.runs)))


def figure(runs: list[Run]) -> str:
    """The SVG file: two charts side by side, with their titles and a legend."""
    window = smoothing_window(max(len(run.steps) for run in runs))
    row = []
    for metric, title, percent in CHARTS:
        curves = [Curve(*run.series(metric), color=number) for number, run in enumerate(runs)]
        row.append((title, draw_curves(curves, window, title, percent=percent)))
    return arrange([row], [label.upper() for label in short_labels([run.label for run in runs])])


def arrange(rows: list[list[tuple[str, str]]], labels: list[str]) -> str:
    """An SVG file with rows of charts of `draw_curves`, each with its title, and a legend of the colors below.

    Args:
        rows: title and SVG of each chart.
        labels: names of the first colors of `plots.COLORS`.
    """
    parts = []
    for number, row in enumerate(rows):
        for position, (title, drawing) in enumerate(row):
            left, top = position * (WIDTH + 16), number * (TITLE + HEIGHT)
            place = f'<svg x="{left}" y="{top + TITLE}" width="{WIDTH}" height="{HEIGHT}" '
            parts.append(f'<text x="{left + 6}" y="{top + 18}" class="title">{title}</text>')
            parts.append(drawing.replace("<svg ", place, 1))
    bottom = len(rows) * (TITLE + HEIGHT)
    x, y = 12, bottom + 14
    for color, label in zip(COLORS, labels, strict=False):
        parts.append(f'<line x1="{x}" x2="{x + 22}" y1="{y}" y2="{y}" stroke="{color}"/>')
        parts.append(f'<text x="{x + 30}" y="{y + 4}">{label}</text>')
        x += max(110, 50 + 8 * len(label))
    width, height = len(rows[0]) * (WIDTH + 16) - 16, bottom + LEGEND
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">\n'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
