"""`g2rl report`: its inputs, its contents, and that nothing in a run's files can break or inject into the page."""

from __future__ import annotations

import json
import math
import os
import re

import numpy as np
import pytest
from report_pages import HOSTILE, Structure
from typer.testing import CliRunner

from megatron_g2rl import cli
from megatron_g2rl.config.loading import dump_config, load_config
from megatron_g2rl.errors import UserError
from megatron_g2rl.report.charts import HEADLINES, sections
from megatron_g2rl.report.groups import group_runs
from megatron_g2rl.report.page import report_page
from megatron_g2rl.report.plots import COLORS
from megatron_g2rl.report.runs import read_runs, short_labels
from megatron_g2rl.report.series import show, smooth, smoothing_window, start_and_end
from megatron_g2rl.report.settings import setting_rows
from megatron_g2rl.report.summary import summarize
from megatron_g2rl.tracking.table import METRICS


@pytest.fixture
def make_run(tmp_path, repository):
    """Writes the folder of a run and returns it."""

    def make(name="a", metrics=None, overrides=(), **files):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        metrics = metrics or [{"step": i, "reward/pass_rate": i / 20, "time/step_s": 2.0} for i in range(20)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        config = load_config(repository / "examples/quickstart/arithmetic.yaml", ["trainer.steps=20", *overrides])
        (folder / "config.yaml").write_text(dump_config(config))
        for file, lines in files.items():
            (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def test_a_folder_without_metrics_is_one_error_with_its_name(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    output = tmp_path / "page.html"
    result = CliRunner().invoke(cli.app, ["report", str(make_run()), str(tmp_path / "empty"), "--output", str(output)])
    assert result.exit_code == 1 and not output.exists()
    assert str(tmp_path / "empty") in result.stderr and "metrics.jsonl" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_run_without_a_finished_step_is_an_error(make_run, tmp_path):
    folder = make_run()
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no step"):
        read_runs([folder])


def test_an_output_that_cannot_be_written_is_an_error_with_its_name(make_run, tmp_path):
    result = CliRunner().invoke(cli.app, ["report", str(make_run()), "--output", str(tmp_path)])
    assert result.exit_code == 1 and str(tmp_path) in result.stderr


def test_broken_lines_nulls_and_non_numeric_values_are_skipped_and_counted(make_run):
    folder = make_run(metrics=[{"step": 0, "a": 1, "b": None, "c": "x", "d": True, "e": [1]}, {"step": 2, "b": 3}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "a": NaN, "b": Infinity}\n[1]\n{"a": 1}\n{"step": 4, "a"')
    [run] = read_runs([folder])
    assert run.metrics == {0: {"a": 1.0}, 2: {"b": 3.0}, 3: {}}
    assert run.broken_lines == 3
    assert run.series("a")[0] == [0, 2, 3] and [math.isnan(v) for v in run.series("a")[1]] == [False, True, True]
    assert "3 lines" in report_page([run])


def test_evaluations_come_from_their_own_file_and_add_no_steps(make_run):
    lines = [{"step": s, "evaluation/pass_at_8": s / 40, "time/evaluation_s": 5} for s in (0, 20)]
    [run] = read_runs([make_run(evaluation=lines)])
    assert run.series("evaluation/pass_at_8") == ([0, 20], [0.0, 0.5])
    assert run.steps == list(range(20))
    assert "Evaluation set" in report_page([run])


def test_files_of_an_older_version_are_read_with_the_new_names(make_run):
    old = {"response/tokens_mean": 9.0, "geometry/negative_share": 0.5, "cost/step_share": 0.1}
    lines = [{"step": 0, "evaluation/majority_at_16": 0.25, "evaluation/cut_share": 0.125}]
    folder = make_run(
        metrics=[{"step": i, **old} for i in range(3)],
        evaluation=lines,
        responses=[{"step": 0, "prompt": "p", "response": "r", "answer": "a", "reward": 1.0, "score": 0.75}],
    )
    config = (folder / "config.yaml").read_text()
    assert "on_corruption: error" in config
    (folder / "config.yaml").write_text(config.replace("on_corruption: error", "on_damage: error"))
    run = read_runs([folder])[0]
    assert run.metrics[0] == {"response_length/mean": 9.0, "geometry/negative_fraction": 0.5, "cost/step_fraction": 0.1}
    assert run.evaluations == {0: {"evaluation/maj_at_16": 0.25, "evaluation/truncated_fraction": 0.125}}
    assert run.settings["checkpoint.on_corruption"] == "error" and "checkpoint.on_damage" not in run.settings
    page = report_page([run])
    assert "maj@16" in page and "25.0%" in page and "novelty ν 0.75" in page


def test_every_metric_is_listed_and_unknown_ones_are_in_a_section_of_their_own(make_run):
    names = {metric.name.replace("*", "4") for metric in METRICS} | {"evaluation/new_thing", "time/new_phase_s", "new"}
    metrics = [{"step": i} | {name: (i + 1) / (k + 7) for k, name in enumerate(sorted(names))} for i in range(3)]
    runs = read_runs([make_run(metrics=metrics)])
    parts = sections(group_runs(runs))
    assert {metric.name for part in parts for metric, _ in part.listed} == names - set(HEADLINES)
    assert [metric.name for metric, _ in parts[-1].listed] == ["evaluation/new_thing", "new", "time/new_phase_s"]
    plotted = {metric.name for part in parts for metrics in part.charts.values() for metric in metrics}
    assert plotted == {metric.name.replace("*", "4") for metric in METRICS if metric.plotted}
    page = report_page(runs)
    assert all(metric.title.replace("*", "4").replace(": ", ", ") in page for metric in METRICS)


def test_titles_and_order_are_those_of_the_table_with_families_in_order_of_their_numbers(make_run):
    names = ["time/step_s", "evaluation/pass_at_16", "evaluation/pass_at_8", "reward/pass_rate", "reward/math/mean"]
    metrics = [{"step": i} | dict.fromkeys(names, i / 9) for i in range(2)]
    parts = sections(group_runs(read_runs([make_run(metrics=metrics)])))
    assert [part.section.title for part in parts] == ["Learning", "Evaluation set", "Time"]
    different = [{"step": i} | {name: i / (k + 9) for k, name in enumerate(names)} for i in range(2)]
    parts = sections(group_runs(read_runs([make_run("b", metrics=different)])))
    assert [list(part.charts) for part in parts] == [
        ["Pass rate", "Reward function math"],
        ["pass@8", "pass@16"],
        ["Step time"],
    ]


def test_constant_metrics_are_named_in_one_line_and_not_drawn(make_run):
    metrics = [{"step": i, "reward/timeouts": 0, "response/count": 64, "reward/pass_rate": i / 9} for i in range(4)]
    second = [{"step": i, "reward/timeouts": 0, "response/count": 32, "reward/pass_rate": 0.5} for i in range(4)]
    runs = read_runs([make_run("a", metrics), make_run("b", second)])
    parts = sections(group_runs(runs))
    assert [part.constant for part in parts] == [["Reward timeouts (0)"], ["Responses (64 / 32)"]]
    assert [list(part.charts) for part in parts] == [["Pass rate"], []]
    page = report_page(runs)
    assert "because constant: Reward timeouts (0).</p>" in page and page.count("Reward timeouts") == 1


def test_values_equal_to_those_of_an_earlier_metric_are_not_repeated(make_run):
    rewards = [{"step": i, "reward/mean": i / 8, "reward/shaped_mean": i / 8} for i in range(4)]
    shaped = [{"step": i, "reward/mean": i / 8, "reward/shaped_mean": i / 5} for i in range(4)]
    grpo, g2rl = read_runs([make_run("grpo", rewards), make_run("g2rl", shaped)])
    assert sections(group_runs([grpo]))[0].repeated == ["Reward, shaped (as Reward, base)"]
    listed = {metric.name: cells for metric, cells in sections(group_runs([grpo, g2rl]))[0].listed}
    assert listed["reward/shaped_mean"] == ["as Reward, base", "0.1 → 0.5"]


def test_every_value_is_on_the_page_once(make_run):
    """Irrational values that are distinct in three digits, so that none can be on the page twice by chance."""
    names = [m.name for m in METRICS if "*" not in m.name and m.unit != "fraction"] + ["reward/pass_rate"]
    value = {name: (0.1317 + 0.0123 * k) for k, name in enumerate(names)}
    runs = read_runs([make_run(metrics=[{"step": i} | {n: v * (1 + i) for n, v in value.items()} for i in range(2)])])
    text = re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", report_page(runs), flags=re.DOTALL)
    for name, number in value.items():
        cell = re.escape(show(number, name == "reward/pass_rate"))
        assert len(re.findall(rf"(?<![\d.]){cell} →", text)) == 1, name


@pytest.mark.parametrize("steps", [[0], [0, 1], [5, 900], list(range(30))])
def test_missing_metrics_never_break_the_page(make_run, steps):
    metrics = [{"step": s, "mismatch/kl": 0.0, "geometry/mean_cosine": None, "time/rollout_s": 1.0} for s in steps]
    old = make_run("old", metrics=metrics)
    (old / "config.yaml").unlink()
    full = make_run("full", responses=[{"step": 0}, {"prompt": None, "reward": "x"}])
    Structure(report_page(read_runs([old])))
    Structure(report_page(read_runs([old, full])))


def test_hostile_text_is_escaped(make_run):
    row = dict(step=HOSTILE, prompt=HOSTILE, response=HOSTILE, answer=HOSTILE, reward=1.0, score=0.5, shaped=1.0)
    metrics = [{"step": i, HOSTILE: 1.0, f"evaluation/{HOSTILE}": 0.5, f"time/{HOSTILE}_s": 1.0} for i in range(12)]
    name = HOSTILE.replace("/", "|").replace("\x00", "").replace("\ud800", "")
    folder = make_run(name, metrics=metrics, responses=[row])
    (folder / "config.yaml").write_text(f"run:\n  name: {json.dumps(HOSTILE)}\n  seed: 0\n")
    page = report_page(read_runs([folder, folder]))
    found = Structure(page)
    assert not {"script", "img", "iframe", "object"} & set(found.seen)
    assert not [key for key, _ in found.attributes if key.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f]", page)
    output = folder / "page.html"
    assert CliRunner().invoke(cli.app, ["report", str(folder), "--output", str(output)]).exit_code == 0
    assert "&lt;script&gt;alert(1)" in output.read_text(encoding="utf-8")


def test_the_page_loads_no_external_resources_and_its_ids_are_unique(make_run):
    page = report_page(read_runs([make_run("a"), make_run("b")]))
    attributes = Structure(page).attributes
    links = [value for key, value in attributes if key in ("href", "src", "xlink:href", "action")]
    assert links and all(value.startswith(("#", "data:,")) for value in links)
    assert not re.findall(r"url\((?!#)|@import|@font-face", page)
    ids = [value for key, value in attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in links if value.startswith("#")} <= set(ids)


def test_every_chart_has_an_accessible_name(make_run):
    page = report_page(read_runs([make_run()]))
    drawings = re.findall(r"<svg [^>]*role=\"img\"[^>]*>", page)
    assert drawings and all("aria-label=" in drawing for drawing in drawings)
    assert len(re.findall("<svg ", page)) == len(drawings) + page.count('aria-hidden="true"')


def test_runs_of_one_name_get_different_labels(make_run):
    first, second = make_run("x/run"), make_run("y/run")
    assert [run.label for run in read_runs([first, second, make_run("z")])] == ["x/run", "y/run", "z"]
    assert len({run.label for run in read_runs([first, first])}) == 2


def test_short_labels_omit_the_common_prefix():
    assert short_labels(["quickstart_grpo", "quickstart_g2rl"]) == ["grpo", "g2rl"]
    assert short_labels(["a-1"]) == ["a-1"] and short_labels(["run_", "run_a"]) == ["run_", "a"]
    assert short_labels(["grpo", "g2rl"]) == ["grpo", "g2rl"]


def test_different_settings_are_found_and_names_and_folders_are_ignored(make_run):
    changed = ["exploration.method=none", "run.name=b", "checkpoint.every_steps=3", "trainer.group_size=16"]
    runs = read_runs([make_run("a"), make_run("b", overrides=changed)])
    rows = setting_rows(group_runs(runs))
    assert [(row.key, row.values) for row in rows if row.differs] == [("trainer.group_size", ["8", "16"])]
    assert [line.cells[0] for line in summarize(group_runs(runs)).runs] == ["G2RL", "GRPO"]
    page = report_page(runs)
    assert "Other settings that differ (1)" in page and "quickstart | b" in page
    assert all(page.count(f"{key}</code></th>") == 1 for key in ("trainer.group_size", "run.name", "trainer.steps"))


def test_the_summary_warns_that_one_seed_is_no_evidence_and_averages_seeds(make_run):
    second = [{"step": i, "reward/pass_rate": i / 40, "time/step_s": 4.0} for i in range(20)]
    runs = read_runs([make_run("a"), make_run("b", second, ["run.seed=1"])])
    (group,) = group_runs(runs)
    assert group.seeds == ["0", "1"]
    summary = summarize([group])
    assert not any("One seed is not evidence" in note for note in summary.notes)
    assert [line.label for line in summary.runs] == ["a", "b"] and summary.columns[:3] == ["Method", "Seeds", "Steps"]
    starts, ends = ([np.mean([i / scale for i in steps]) for scale in (20, 40)] for steps in (range(10), range(10, 20)))
    half = 12.7062 * np.std(ends, ddof=1) / math.sqrt(2)
    (line,) = summary.groups
    assert line.cells[:3] == ["G2RL", "0, 1", "20 of 20"]
    assert line.cells[-2] == f"{np.mean(starts):.1%} → {np.mean(ends):.1%} ± {half:.1%}"
    assert any("One seed is not evidence" in note for note in summarize(group_runs(runs[:1])).notes)
    assert any("At least one setting" in note for note in summarize(group_runs(read_mixed(make_run, runs))).notes)


def read_mixed(make_run, runs):
    return [*runs, *read_runs([make_run("c", overrides=["exploration.method=none"])])]


def test_runs_of_different_length_are_compared_on_their_common_steps(make_run):
    short = [{"step": i, "reward/pass_rate": 0.5} for i in range(12)]
    runs = read_runs([make_run("long"), make_run("short", metrics=short)])
    summary = summarize(group_runs(runs))
    # Steps 0 to 5 and 6 to 11 of both.
    assert summary.columns[:4] == ["Method", "Seed", "Steps", "Pass rate"]
    assert [line.cells[2:4] for line in summary.runs] == [["20 of 20", "12.5% → 42.5%"], ["12 of 20", "50.0%"]]
    assert any("first and the last 6 steps that all runs have" in note for note in summary.notes)
    assert any("too few steps" in note for note in summary.notes)


def test_runs_without_a_common_step_show_their_own(make_run):
    late = [{"step": i, "reward/pass_rate": i / 40} for i in range(30, 34)]
    runs = read_runs([make_run("early"), make_run("late", metrics=late)])
    assert start_and_end(runs, "reward/pass_rate")[1] == (pytest.approx(30.5 / 40), pytest.approx(32.5 / 40))
    assert "no step in common" in summarize(group_runs(runs)).notes[0]


def test_smoothing_is_the_mean_of_the_neighboring_steps_and_skips_gaps():
    values = np.random.default_rng(0).normal(size=40)
    inside = np.convolve(values, np.ones(7) / 7, mode="valid")
    assert smooth(list(values), 7)[3:-3] == pytest.approx(inside)
    assert smooth([1.0, math.nan, 3.0], 3) == pytest.approx([1.0, 2.0, 3.0])
    assert all(smoothing_window(n) % 2 == 1 for n in range(1, 2000))


def test_start_and_end_skip_gaps_and_evaluations_are_not_averaged(make_run):
    gaps = [{"step": i, "policy/entropy": None if i == 2 else i} for i in range(2, 8)]
    evaluations = [{"step": s, "evaluation/pass_at_1": s / 100} for s in (0, 10, 20)]
    runs = read_runs([make_run(metrics=gaps, evaluation=evaluations)])
    assert start_and_end(runs, "policy/entropy") == [(3.5, 6.0)]  # of 3 and 4, and of 5, 6 and 7
    assert start_and_end(runs, "evaluation/pass_at_1") == [(0.0, 0.2)]
    assert math.isnan(start_and_end(runs, "update/kl")[0][0])
    assert show(0.12345, percent=True) == "12.3%" and show(math.nan) == "–" and show(-3.2e-7) == "−3.2e−07"


def test_the_cost_of_exploration_is_in_a_chart_and_in_the_table(make_run):
    names = ("features_s", "reduce_s", "shaping_s", "exploration_s", "per_response_ms", "per_group_ms", "step_fraction")
    costs = [{f"cost/{name}": (k + 1 + i) / 64 for k, name in enumerate(names)} for i in range(2)]
    metrics = [{"step": i, "reward/pass_rate": i / 2, "time/step_s": 2.0} | costs[i] for i in range(2)]
    page = report_page(read_runs([make_run("g2rl", metrics), make_run("grpo")]))
    table = page[page.index('aria-label="Values: Time"') :]
    table = table[: table.index("</table>")]
    assert all(text in table for text in ("features Φ", "sum over ranks", "novelty and rewards", "0.0156 → 0.0312"))
    assert "Line chart of Cost of exploration over" in page and "10.9% → 12.5%" in table
    assert "Cost of exploration" not in report_page(read_runs([make_run("other")]))


# Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(color):
    values = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    x = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(axis=1)
    f = np.where(x > 216 / 24389, np.cbrt(x), (24389 / 27 * x + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colors_of_runs_are_distinct_for_every_kind_of_color_vision(kind):
    seen = [lab(np.array(BLINDNESS[kind]) @ linear(color)) for color in COLORS]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(distances) > 10  # about 2.3 is just noticeable between adjacent areas; lines are thin and apart


def test_colors_of_runs_have_the_contrast_of_graphics_on_a_page():
    assert min(1.05 / (TO_XYZ[1] @ linear(color) + 0.05) for color in COLORS) >= 3  # WCAG 2.2, 1.4.11


@pytest.mark.parametrize("text", ["a: \ud800", "[" * 3000, "2024-99-99: 1\na: 2024-99-99", "? {a: b}\n: c", None])
def test_an_unreadable_configuration_of_a_run_is_skipped_and_a_pipe_is_not_opened(make_run, text):
    folder = make_run()
    (folder / "config.yaml").unlink()
    if text is None:
        os.mkfifo(folder / "config.yaml")
    else:
        (folder / "config.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    (run,) = read_runs([folder])
    assert run.settings == {} and report_page([run])
