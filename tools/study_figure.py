"""Draw the figure of docs/results.md: accuracy and coverage of each setting over training, a row for each task.

    g2rl sweep examples/study/mappings.yaml
    python tools/study_figure.py docs/images/study.svg runs/*_seed?

The charts are those of `g2rl report`: the line is the mean over seeds, the band its 95% t interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from readme_figure import arrange

from megatron_g2rl.report.groups import group_runs, setting
from megatron_g2rl.report.plots import Curve, draw_curves
from megatron_g2rl.report.runs import Run, read_runs
from megatron_g2rl.report.series import seed_band

CHARTS = (
    ("evaluation/pass_at_1", "pass@1", True),
    ("evaluation/pass_at_8", "pass@8", True),
    ("evaluation/pass_at_32", "pass@32", True),
)
"""Metric, title, whether it is a percentage."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    arguments.output.write_text(figure(read_runs(arguments.runs)))


def figure(runs: list[Run]) -> str:
    """The SVG file: a row of charts for each `data.source`; all of them have the same settings in the same order."""
    by_task: dict[str, list[Run]] = {}
    for run in runs:
        by_task.setdefault(setting(run.settings, "data.source"), []).append(run)
    rows, labels = [], []
    for task, own in by_task.items():
        row, groups = [], group_runs(own)
        labels = [group.label for group in groups]
        for metric, title, percent in CHARTS:
            bands = [seed_band(group.runs, metric, 1) for group in groups]
            curves = [Curve(b.steps, b.mean, n, 0, b.half_width, b.members) for n, b in enumerate(bands)]
            title = f"{task.removeprefix('builtin:')}: {title}"
            row.append((title, draw_curves(curves, 1, title, percent=percent)))
        rows.append(row)
    return arrange(rows, labels)


if __name__ == "__main__":
    main()
