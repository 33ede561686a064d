"""`g2rl report`: its inputs, its contents, and that nothing in a run's files can break or inject into the page."""

from __future__ import annotations

import json
import math
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_g2rl import cli
from megatron_g2rl.config.loading import dump_config, load_config
from megatron_g2rl.errors import UserError
from megatron_g2rl.report.charts import leftover, sections
from megatron_g2rl.report.page import report_page
from megatron_g2rl.report.runs import read_runs, short_labels
from megatron_g2rl.report.series import numbers, show, smooth, smoothing_window
from megatron_g2rl.report.settings import differing, ledger, same_setting_groups, setting_rows
from megatron_g2rl.report.summary import summarize

VOID = {"meta", "link", "br"}
HOSTILE = "</pre></title></style><script>alert(1)</script><img src=//a.test onerror=a()> & \" ' \x00\x1b\ud800 $x$"


class Structure(HTMLParser):
    """Tags of a page; fails on a closing tag without an open one."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes


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


def test_a_run_without_a_finished_step_and_nine_runs_are_errors(make_run, tmp_path):
    folder = make_run()
    with pytest.raises(UserError, match="at most 8"):
        read_runs([folder] * 9)
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
    assert "Maj@16" in page and "25.0%" in page and "novelty ν 0.75" in page


def test_every_metric_is_plotted_or_listed(make_run):
    names = {"reward/mean", "evaluation/new_thing", "time/new_phase_s", "update/loss", "something/new"}
    drawn = sections(names)
    assert leftover(names, drawn) == ["something/new", "update/loss"]
    page = report_page(read_runs([make_run(metrics=[{"step": 0} | dict.fromkeys(names, 1.0)])]))
    assert all(word in page for word in ("something/new", "update/loss", "New thing", "new_phase"))


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
    changed = ["exploration.method=none", "run.name=b", "checkpoint.every_steps=3"]
    runs = read_runs([make_run("a"), make_run("b", overrides=changed)])
    rows = setting_rows(runs)
    assert {row.key for row in rows if row.differs} == {"exploration.method", "run.name", "checkpoint.every_steps"}
    assert [(row.key, row.values) for row in differing(rows)] == [("exploration.method", ["gradient", "none"])]
    assert any("one setting only: exploration.method" in sentence for sentence in summarize(runs).sentences)


def test_the_summary_warns_that_one_seed_is_no_evidence_and_groups_seeds(make_run):
    runs = read_runs([make_run("a"), make_run("b", overrides=["run.seed=1"])])
    assert same_setting_groups(runs) == [[0, 1]]
    assert not any("One seed is no evidence" in sentence for sentence in summarize(runs).sentences)
    assert any("2 seeds" in sentence for sentence in summarize(runs).sentences)
    assert any("One seed is no evidence" in sentence for sentence in summarize(runs[:1]).sentences)


def test_runs_of_different_length_are_compared_on_their_common_steps(make_run):
    short = [{"step": i, "reward/pass_rate": 0.5} for i in range(12)]
    runs = read_runs([make_run("long"), make_run("short", metrics=short)])
    summary = summarize(runs)
    assert summary.tail == "2–11"
    assert any("lowest in long (32.5%)" in sentence for sentence in summary.sentences)  # mean of 2/20 .. 11/20
    assert any("short has finished 12 of its 20 steps" in sentence for sentence in summary.sentences)


def test_the_ledger_is_that_of_the_run_or_the_reason_for_its_absence(make_run):
    folder = make_run()
    [run] = read_runs([folder])
    assert ("responses per step", "256") in [(row.name, row.value) for row in ledger(run).rows]
    (folder / "config.yaml").write_text("run:\n  nme: x\n")
    assert not ledger(run).rows and "nme" in ledger(run).problem


def test_smoothing_is_the_mean_of_the_neighboring_steps_and_skips_gaps():
    values = np.random.default_rng(0).normal(size=40)
    inside = np.convolve(values, np.ones(7) / 7, mode="valid")
    assert smooth(list(values), 7)[3:-3] == pytest.approx(inside)
    assert smooth([1.0, math.nan, 3.0], 3) == pytest.approx([1.0, 2.0, 3.0])
    assert all(smoothing_window(n) % 2 == 1 for n in range(1, 2000))


def test_statistics_of_a_series():
    n = numbers([3, 4, 5, 6], [math.nan, 2.0, 1.0, 2.0])
    assert (n.first, n.last, n.lowest, n.lowest_step, n.highest, n.highest_step) == (2, 2, 1, 5, 2, 4)
    assert n.tail_mean == pytest.approx(5 / 3) and n.tail_deviation == pytest.approx(np.std([2, 1, 2]))
    assert show(0.12345, percent=True) == "12.3%" and show(math.nan) == "–" and show(-3.2e-7) == "−3.2e−07"


def test_the_cost_of_exploration_is_in_a_chart_with_its_table(make_run):
    names = ("features_s", "reduce_s", "shaping_s", "exploration_s", "per_response_ms", "per_group_ms", "step_fraction")
    costs = {f"cost/{name}": (number + 1) / 64 for number, name in enumerate(names)}
    with_costs = make_run("g2rl", [{"step": i, "reward/pass_rate": 0.5, "time/step_s": 2.0} | costs for i in range(3)])
    page = report_page(read_runs([with_costs, make_run("grpo")]))
    table = page[page.index("Numbers of Cost of exploration") :]
    table = table[: table.index("</table>")]
    assert all(text in table for text in ("features Φ", "their sum over ranks", "novelty and rewards", "0.0156"))
    assert "Numbers of Exploration fraction" in page and "10.9%" in page
    assert "Cost of exploration" not in report_page(read_runs([make_run("other")]))


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
