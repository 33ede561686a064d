"""The report of several methods and seeds: groups, labels, baseline, bands, and the numbers of the comparison."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from report_pages import HOSTILE, Structure
from synthetic_runs import STEPS, write_all, write_result, write_run
from typer.testing import CliRunner

from megatron_g2rl import cli
from megatron_g2rl.config.evaluated import training_settings
from megatron_g2rl.errors import UserError
from megatron_g2rl.report import comparison as comparing
from megatron_g2rl.report.charts import sections
from megatron_g2rl.report.comparison import compare, comparison_markdown
from megatron_g2rl.report.groups import find_baseline, group_members, group_runs, setting_labels
from megatron_g2rl.report.intervals import bootstrap_difference, mean_over_seeds, seed_difference
from megatron_g2rl.report.page import report_page
from megatron_g2rl.report.plots import COLORS, MARKERS
from megatron_g2rl.report.results import group_results, read_results
from megatron_g2rl.report.runs import Run, read_runs
from megatron_g2rl.report.series import seed_band, show_spread, show_to, smooth
from megatron_g2rl.report.settings import setting_rows
from megatron_g2rl.report.summary import summarize
from megatron_g2rl.report.tables import accuracy_table, difference_table, latex, write_table

pytestmark = pytest.mark.same_for_both


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two methods with five seeds: run folders, and the folder of their evaluations."""
    return write_all(tmp_path_factory.mktemp("study"), ("none", "gradient"), 5)


@pytest.fixture(scope="module")
def runs(study):
    return read_runs(study[0])


@pytest.fixture(scope="module")
def page(study, runs):
    return report_page(runs, read_results([study[1]]))


def run(label="a", settings=None, values=(), name="policy/entropy"):
    """A run of these values of one metric, with the steps before them."""
    return Run(
        label,
        Path(label[:1]),
        {i: {} if v is None else {name: v} for i, v in enumerate(values)},
        {},
        settings or {},
        [],
        0,
    )


def test_runs_that_differ_only_in_seed_name_and_outputs_are_a_group(runs):
    none, gradient = group_runs(runs)
    assert (none.label, gradient.label) == ("GRPO", "G2RL")
    assert none.seeds == gradient.seeds == ["0", "1", "2", "3", "4"]
    assert [run.label for run in gradient.runs] == [f"gradient_seed{seed}" for seed in range(5)]


def test_a_repeated_seed_and_an_unknown_configuration_begin_a_group():
    assert group_members(["a", "b", "a", "a", "a"], ["0", "0", "1", "0", "1"]) == [[0, 2], [1], [3, 4]]
    assert group_members([None, None], ["–", "–"]) == [[0], [1]]
    old, new, unknown = {"run.seed": 0, "a": 1}, {"run.seed": 1, "a": 1}, {}
    groups = group_runs([run("x", old), run("y", new), run("x2", old), run("y2", new), run("z", unknown)])
    assert [[each.label for each in group.runs] for group in groups] == [["x", "y"], ["x2", "y2"], ["z"]]
    assert len({group.label for group in groups}) == 3 and groups[2].label == "z"


def test_keys_of_shaping_separate_no_runs_without_a_method():
    settings = [{"run.seed": seed, "exploration.mapping": name} for seed, name in enumerate("ab")]
    for method, count in (("none", 1), ("gradient", 2)):
        runs = [run(f"r{i}", each | {"exploration.method": method}) for i, each in enumerate(settings)]
        assert len(group_runs(runs)) == count


def test_single_runs_keep_their_names():
    groups = group_runs([run("run_a", {"a": 1}), run("run_b", {"a": 2})])
    assert [(group.label, group.short) for group in groups] == [("run_a", "a"), ("run_b", "b")]


def test_labels_name_what_differs_and_nothing_else():
    def labels(*settings):
        return setting_labels(settings, [f"run{number}" for number in range(len(settings))])

    grpo, g2rl = {"exploration.method": "none", "x.rate": 1}, {"exploration.method": "gradient", "x.rate": 1}
    assert labels(grpo, g2rl | {"x.rate": 2}) == ["GRPO", "G2RL"]
    assert labels(grpo, g2rl, g2rl | {"x.rate": 2}) == ["GRPO", "G2RL, rate 1", "G2RL, rate 2"]
    both = [grpo | {"x.rate": rate, "x.size": size} for rate in (1, 2) for size in (3, 4)]
    assert labels(*both) == [f"GRPO, rate {rate}, size {size}" for rate in (1, 2) for size in (3, 4)]
    assert labels(grpo, grpo, {}) == ["GRPO (run0)", "GRPO (run1)", "run2"]
    others = [grpo | {"exploration.method": method} for method in ("hidden", "elliptical")]
    assert labels(grpo | {"x.rate": 3}, grpo, *others) == ["GRPO, rate 3", "GRPO", "hidden", "elliptical"]
    # nothing is shaped without a method: the mapping distinguishes methods only
    mapped = [each | {"exploration.mapping": m} for each, m in ((grpo, "a"), (g2rl, "a"), (g2rl, "b"))]
    bonus = grpo | {"exploration.mapping": "b", "x.bonus": 0.1}
    assert labels(*mapped, bonus) == ["GRPO", "G2RL, mapping a", "G2RL, mapping b", "GRPO, bonus 0.1"]
    # one key that separates all is preferred to two that do so together
    assert labels(*(each | {"x.name": k} for k, each in enumerate(both))) == [f"GRPO, name {k}" for k in range(4)]


def test_the_baseline_is_plain_grpo_unless_one_is_named():
    plain = {"exploration.method": "none", "loss.entropy": 0, "loss.kind": "grpo"}
    settings = [
        plain | {"loss.kind": "other"},
        plain | {"loss.entropy": 1},
        plain,
        plain | {"exploration.method": "gradient"},
    ]
    names = [["other"], ["entropy"], ["GRPO", "seed0"], ["G2RL"]]
    assert find_baseline(settings, names, None) == 2
    # that nearly all other runs have the mapping of the variant does not make the variant the usual one
    mappings = ("b", "b", "a", "b")
    mapped = [each | {"exploration.mapping": m} for each, m in zip(settings, mappings, strict=True)]
    assert find_baseline(mapped, names, None) == 2
    assert find_baseline(settings, names, "G2RL") == 3 and find_baseline(settings, names, "seed0") == 2
    assert find_baseline(settings[3:], names[3:], None) == 0
    with pytest.raises(
        UserError, match="--baseline none: there is no such run or setting; name a run, or one of other,"
    ):
        find_baseline(settings, names, "none")


def test_bands_are_t_intervals_of_smoothed_seeds_and_end_with_the_first_seed(runs):
    band = seed_band(group_runs(runs)[1].runs, "policy/entropy", 7)
    smoothed = np.array([smooth(each.series("policy/entropy")[1], 7) for each in runs[5:]])
    mean, half = mean_over_seeds(smoothed)
    assert (
        band.steps == list(range(STEPS)) and band.mean == pytest.approx(mean) and band.half_width == pytest.approx(half)
    )
    assert [values for _, values in band.members] == smoothed.tolist()
    seeds = [run(values=[1, 2, 3, 4]), run(values=[3, None, 5]), run(values=[None, None])]
    band = seed_band(seeds, "policy/entropy", 1)  # the third has no value and is left out
    assert (
        band.steps == [0, 1, 2]
        and band.mean == [2, 2, 4]
        and [math.isnan(half) for half in band.half_width] == [0, 1, 0]
    )
    assert seed_band(seeds[2:], "policy/entropy", 1).steps == []


def test_the_comparison_has_means_over_seeds_and_paired_differences(runs):
    groups = group_runs(runs)
    table = compare(groups)
    assert groups[table.baseline].label == "GRPO"
    rows = {row.title: row.cells for rows in table.blocks.values() for row in rows}

    def last(run, name):
        return float(np.mean([run.metrics[step][name] for step in range(STEPS - 10, STEPS)]))

    for title, name, percent in (
        ("Pass rate", "reward/pass_rate", True),
        ("Effective rank", "geometry/effective_rank", False),
    ):
        values = [{str(seed): last(each, name) for seed, each in enumerate(group.runs)} for group in groups]
        means, halves = zip(*(mean_over_seeds(np.array(list(own.values()))) for own in values), strict=True)
        assert [cell.value for cell in rows[title]] == [
            show_spread(m, h, percent) for m, h in zip(means, halves, strict=True)
        ]
        difference = seed_difference(values[1], values[0])
        assert rows[title][0].difference == ""
        shown = re.findall(r"[+−][\d.]+", rows[title][1].difference)
        scale = 100 if percent else 1
        expected = [scale * value for value in (difference.mean, difference.low, difference.high)]
        assert [float(text.replace("−", "-")) for text in shown] == pytest.approx(expected, abs=0.051)
        assert rows[title][1].difference.endswith("*") == difference.excludes_zero
    hours = [sum(values["time/step_s"] for values in each.metrics.values()) / 3600 for each in runs[5:]]
    assert rows["Time of all steps"][1].value == show_spread(*map(float, mean_over_seeds(np.array(hours))))
    assert rows["Cost of exploration, total"][0].value == "–" and rows["Cost of exploration, total"][0].difference == ""
    evaluated = [each.evaluations[STEPS]["evaluation/pass_at_8"] for each in runs[5:]]
    assert rows["pass@8"][1].value == show_spread(*map(float, mean_over_seeds(np.array(evaluated))), True)


def test_the_comparison_as_markdown_has_the_numbers_of_the_page(runs, study, tmp_path):
    groups, output = group_runs(runs), tmp_path / "comparison.md"
    folders = [str(each.folder) for each in runs]
    assert CliRunner().invoke(cli.app, ["report", *folders, "--output", str(output)]).exit_code == 0
    text = output.read_text()
    for heading, rows in compare(groups).blocks.items():
        assert f"| {heading} | GRPO (baseline) |" in text
        for row in rows:
            (line,) = (each for each in text.splitlines() if each.startswith((f"| {row.title} |", f"| {row.title} (")))
            assert all(cell.value in line and cell.difference in line for cell in row.cells)
    assert all(f"\n- {note}\n" in text for note in compare(groups).notes)


def test_many_settings_are_rows_of_the_markdown(runs, monkeypatch):
    groups = group_runs(runs)
    comparison = compare(groups)
    columns = comparison_markdown(groups, comparison).splitlines()
    monkeypatch.setattr(comparing, "MOST_COLUMNS", 1)
    rows = comparison_markdown(groups, comparison).splitlines()

    def split(lines: list[str]) -> list[list[str]]:
        """Cells of the first table."""
        return [line.strip("| ").split(" | ") for line in lines[: lines.index("")] if "---" not in line]

    assert split(rows) == [list(line) for line in zip(*split(columns), strict=True)]
    assert rows[1].count("---") == len(split(columns)) and rows[-1] == columns[-1]


def test_a_named_baseline_turns_the_differences_around(runs):
    groups = group_runs(runs)
    rows = [compare(groups, baseline=name).blocks["Accuracy"][0] for name in (None, "gradient_seed3")]
    assert [bool(cell.difference) for cell in rows[1].cells] == [True, False]
    forward, back = rows[0].cells[1].difference, rows[1].cells[0].difference
    assert forward[1:].split(" ")[0] == back[1:].split(" ")[0] and forward[0] == "+" and back[0] == "−"


def test_runs_of_one_seed_are_compared_only_with_evaluations_or_a_named_baseline(study, runs):
    single = group_runs([runs[0], runs[5]])
    assert compare(single) is None and compare(group_runs(runs[:5])) is None
    assert compare(single, baseline="none_seed0").blocks["Accuracy"][0].cells[1].difference.count("(") == 0
    row = compare(single, read_results([study[1]])).blocks["Accuracy by g2rl evaluate"][0]
    assert row.cells[1].difference.count("to") == 1  # an interval over problems


def test_evaluations_are_compared_by_problem_and_seed(study, runs):
    results = read_results([study[1]])
    groups = group_runs(runs)
    table = compare(groups, results)
    rows = {row.title: row.cells for row in table.blocks["Accuracy by g2rl evaluate"]}
    assert list(rows) == ["aime24, pass@1", "aime24, maj@8", "math500, pass@1", "math500, maj@8"]
    values = {
        method: np.array(
            [
                [r.per_problem["pass_at_1"][problem] for problem in range(40)]
                for r in results
                if r.benchmark == "math500" and r.settings["exploration.method"] == method
            ]
        )
        for method in ("none", "gradient")
    }
    assert values["none"].shape == (5, 40)
    expected = bootstrap_difference(values["gradient"], values["none"], paired=True)
    numbers = [100 * number for number in (expected.mean, expected.low, expected.high)]
    shown = [float(text.replace("−", "-")) for text in re.findall(r"[+−][\d.]+", rows["math500, pass@1"][1].difference)]
    assert shown == pytest.approx(numbers, abs=0.051)
    assert any("checkpoints of step 120" in note for note in table.notes)
    (markdown_row,) = difference_table(results).rows
    assert markdown_row[0] == "G2RL" and markdown_row[1][2].replace("-", "−") == rows["math500, pass@1"][1].difference


def test_only_the_latest_checkpoints_of_these_runs_are_shown(tmp_path, study, runs):
    write_result(tmp_path, "gradient", 0, step=60)
    write_result(tmp_path, "hidden", 0)
    table = compare(group_runs(runs), read_results([study[1], tmp_path]))
    (note,) = (note for note in table.notes if note.startswith("Evaluated, but not"))
    assert "gradient_seed0_step_00000060, hidden_seed0_step_00000120" in note
    assert any("checkpoints of step 120" in note for note in table.notes)


def test_the_table_groups_models_by_the_setting_of_their_training(study, tmp_path):
    results = read_results([study[1]])
    gradient, none = group_results(results)
    assert (gradient.label, none.label) == ("G2RL", "GRPO") and len(none.models) == 5
    table = accuracy_table(results)
    assert [label for label, _ in table.rows] == ["G2RL", "GRPO"] and "mean over seeds" in table.title
    values = [100 * r.metrics["pass_at_1"] for r in results if r.benchmark == "aime24" and r in none.results.values()]
    mean, half = mean_over_seeds(np.array(values))
    assert dict(table.rows)["GRPO"][0].strip("*") == f"{mean:.1f} ± {half:.1f}"
    assert difference_table(results).title.startswith("Difference to GRPO in points, 95% interval by paired bootstrap")
    named = difference_table(results, "gradient_seed1_step_00000120")
    assert [label for label, _ in named.rows] == ["GRPO"] and named.title.startswith("Difference to G2RL")
    assert rf"{mean:.1f} $\pm$ {half:.1f}" in latex([table]) and "±" not in latex([table]).partition("\n")[2]
    write_table([study[1]], tmp_path / "table.md", "GRPO")
    assert "| G2RL |" in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match="no such run or setting"):
        write_table([study[1]], tmp_path / "table.md", "missing")


def test_steps_and_models_without_a_run_are_groups_of_their_own(study, tmp_path):
    for seed in (0, 1):
        write_result(tmp_path, "gradient", seed, "aime24", step=60)
    base = write_result(tmp_path, "hidden", 0, "aime24") / "summary.json"
    base.write_text(json.dumps(json.loads(base.read_text()) | {"training": None, "model": "Qwen--Qwen3-0.6B"}))
    labels = [group.label for group in group_results(read_results([study[1], tmp_path]))]
    assert labels == ["G2RL, step 120", "GRPO", "G2RL, step 60", "Qwen--Qwen3-0.6B"]
    table = difference_table(read_results([study[1], tmp_path]))
    assert table.title.endswith("with one seed, only problems are resampled") and len(table.rows) == 3


def test_the_page_names_settings_once_and_shows_single_seeds_on_demand(page, runs):
    structure = Structure(page)
    assert "Report of 10 runs of 2 settings" in page and "Single runs (10)" in page
    legend = re.search(r'<div class="legend".*?</div>', page, re.DOTALL)[0]
    assert re.findall(r"<bdi>(.*?)</bdi>", legend) == ["GRPO", "G2RL"] and 'type="checkbox" id="seeds"' in legend
    assert "script" not in structure.seen
    charts = re.findall(r'<svg [^>]*role="img".*?</svg>', page, re.DOTALL)
    lines = [chart for chart in charts if "Line chart" in chart]
    assert len(lines) >= 10 and all(chart.count('<g class="seed">') in (5, 10, 20) for chart in lines)
    ids = [value for key, value in structure.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert "GRPO (baseline)" not in page and "(baseline)" in page
    assert "Runs that need attention, in their last steps (" in page and "25% of the responses reach" in page
    assert "95% t interval" in page


def test_settings_that_differ_between_groups_have_one_column_per_group(tmp_path):
    folders = [
        write_run(tmp_path / str(size), "gradient", seed, f"trainer.group_size={size}")
        for size in (8, 16)
        for seed in (0, 1)
    ]
    groups = group_runs(read_runs(folders))
    assert [group.label for group in groups] == ["G2RL, group_size 8", "G2RL, group_size 16"]
    rows = setting_rows(groups)
    assert [(row.key, row.values) for row in rows if row.differs] == [("trainer.group_size", ["8", "16"])]
    (name,) = (row for row in rows if row.key == "run.name")
    assert name.values == ["gradient_seed0", "gradient_seed1"]


def test_many_settings_have_distinct_marks_and_a_chart_per_metric(tmp_path):
    settings = [
        {"exploration.method": "gradient", "rate": rate, "run.seed": seed} for rate in range(12) for seed in range(2)
    ]
    draw = np.random.default_rng(0)
    names = ("geometry/cosine_p10", "geometry/cosine_p90")
    every = [
        Run(f"r{k}", tmp_path, {i: dict(zip(names, draw.random(2), strict=True)) for i in range(3)}, {}, own, [], 0)
        for k, own in enumerate(settings)
    ]
    page = report_page(every)
    Structure(page)
    swatches = re.findall(
        r'<svg class="swatch".*?</svg>', re.search(r'<div class="legend".*?</div>', page, re.DOTALL)[0]
    )
    assert len(swatches) == len(set(swatches)) == 12 > len(COLORS) and len(MARKERS) * len(COLORS) > 40
    titles = [title for part in sections(group_runs(every)) for title in part.charts]
    assert titles == ["Distribution of cosines: 10% quantile", "Distribution of cosines: 90% quantile"]


def test_a_run_that_ended_early_is_named(tmp_path):
    folders = [write_run(tmp_path, "none", seed, steps=4 if seed == 1 else STEPS) for seed in range(2)]
    summary = summarize(group_runs(read_runs(folders)))
    assert any("none_seed1 ends at step 3 of 119" in note for note in summary.notes)
    assert summary.groups[0].cells[2] == f"4 to {STEPS} of {STEPS}"


def test_hostile_settings_and_names_of_groups_are_escaped():
    every = [
        run(f"{HOSTILE}{k}", {"exploration.method": f"{HOSTILE}{k % 2}", "run.seed": k, HOSTILE: HOSTILE}, range(12))
        for k in range(4)
    ]
    groups = group_runs(every)
    assert len(groups) == 2 and all("<script>" in group.label for group in groups)
    found = Structure(report_page(every))
    assert not {"script", "img"} & set(found.seen) and not [key for key, _ in found.attributes if key.startswith("on")]


def test_the_training_of_a_checkpoint_or_an_export_is_that_of_its_run(tmp_path):
    run_folder = write_run(tmp_path, "none", 3, steps=1)
    for name in ("checkpoints/step_00000002", "hf/step_00000002"):
        (run_folder / name).mkdir(parents=True)
        assert training_settings(str(run_folder / name))["run"]["seed"] == 3
    assert training_settings(str(run_folder / "model")) is None and training_settings("Qwen/Qwen3-0.6B") is None
    (run_folder / "config.yaml").write_text("a: [")
    assert training_settings(str(run_folder / "hf/step_00000002")) is None


def test_numbers_have_the_digits_of_their_interval():
    assert show_spread(10.0178, 0.0352) == "10.018 ± 0.035" and show_spread(0.5, 0.0123, True) == "50.0% ± 1.2%"
    assert show_spread(1234.5, 67.8) == "1,234 ± 68" and show_spread(2.5, math.nan) == "2.5"
    assert show_to(-0.01234, 0.01, "+") == "−0.012" and show_to(0.01234, 0.1, "+") == "+0.01"
    assert show_spread(4.0, 0.0) == "4 ± 0" and show_spread(math.nan, math.nan) == "–"


def test_the_command_takes_evaluations_and_a_baseline_and_names_what_is_wrong(study, tmp_path):
    few = [str(write_run(tmp_path, method, 0, steps=2)) for method in ("none", "gradient")]
    output = tmp_path / "page.html"
    shutil.copytree(study[1] / "none_seed0_step_00000120", tmp_path / "e/none_seed0_step_00000120")
    options = ["--output", str(output), "--evaluations", str(tmp_path / "e"), "--baseline", few[1]]
    assert CliRunner().invoke(cli.app, ["report", *few, *options]).exit_code == 0
    assert "Accuracy by g2rl evaluate" in output.read_text()
    for arguments, words in (
        ([*few, "--output", "few.tex"], "--output few.tex: LaTeX is written only with --table"),
        ([*few, "--output", "few.md"], "needs two of them and several seeds of one, --evaluations or --baseline"),
        ([*few, "--baseline", "missing"], "--baseline missing: there is no such run or setting"),
        ([*few, "--evaluations", str(tmp_path / "none")], "none has no summary.json"),
        ([str(study[1]), "--table", "--evaluations", str(study[1])], "--evaluations is for the page"),
    ):
        done = CliRunner().invoke(cli.app, ["report", *arguments])
        assert done.exit_code == 1 and words in " ".join(done.output.split())
