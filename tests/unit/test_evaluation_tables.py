"""Tables of evaluation results: numbers against plain numpy, both formats, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from megatron_g2rl import cli
from megatron_g2rl.errors import UserError
from megatron_g2rl.report.tables import accuracy_table, difference_table, read_results, write_table


def write(folder: Path, model: str, benchmark: str, values: dict[str, list[float]], ids=None, **changes) -> Path:
    place = folder / model / benchmark
    place.mkdir(parents=True)
    ids = list(range(len(next(iter(values.values()))))) if ids is None else ids
    content = dict(model=model, benchmark=benchmark, problem_ids=ids, per_problem=values)
    content |= dict(metrics={name: float(np.mean(each)) for name, each in values.items()} | {"timeouts": 0.0})
    (place / "summary.json").write_text(json.dumps(content | changes))
    return place


@pytest.fixture
def results(tmp_path):
    draw = np.random.default_rng(0)
    grpo = draw.random(40)
    write(tmp_path, "grpo", "math500", {"pass_at_1": grpo.tolist(), "maj_at_8": [0.25] * 40})
    write(tmp_path, "g2rl", "math500", {"pass_at_1": (grpo + 0.1).tolist(), "maj_at_8": draw.random(40).tolist()})
    write(tmp_path, "g2rl", "aime_24", {"pass_at_1": [0.5, 0.0]})
    return [tmp_path / "grpo", tmp_path / "g2rl"]


def test_accuracies_are_in_percent_and_the_best_is_marked(results):
    table = accuracy_table(read_results(results))
    assert table.columns == (("math500", "pass_at_1"), ("math500", "maj_at_8"), ("aime_24", "pass_at_1"))
    rows = dict(table.rows)
    assert list(rows) == ["grpo", "g2rl"]
    assert rows["grpo"][2] == "-" and rows["g2rl"][2] == "25.0"
    assert rows["g2rl"][0].endswith("*") and not rows["grpo"][0].endswith("*")
    assert float(rows["g2rl"][0][:-1]) - float(rows["grpo"][0]) == pytest.approx(10, abs=0.11)


def test_differences_are_paired_by_problem(results):
    table = difference_table(read_results(results))
    ((model, cells),) = table.rows
    assert model == "g2rl" and table.columns == (("math500", "pass_at_1"), ("math500", "maj_at_8"))
    # every problem differs by the same amount: the paired interval has no width, however different the problems are
    assert cells[0] == "+10.0 (+10.0 to +10.0)*"
    mean, low, high = (float(part) for part in cells[1].strip("*)").replace("(", "").replace("to ", "").split())
    assert low < mean < high and high - low > 5


def test_numbers_of_distinct_solutions_are_no_percentages(tmp_path):
    for model, values in {"a": [1.0, 2.0], "b": [2.5, 3.5]}.items():
        write(tmp_path, model, "own", {"pass_at_8": [0.5, 0.5], "distinct_correct_at_8": values})
    results = read_results([tmp_path / "a", tmp_path / "b"])
    accuracies, differences = accuracy_table(results), difference_table(results)
    assert [cells for _, cells in accuracies.rows] == [("50.0*", "1.50"), ("50.0*", "3.00*")]
    assert differences.rows[0][1] == ("+0.0 (+0.0 to +0.0)", "+1.50 (+1.50 to +1.50)*")
    assert "number of distinct solutions" in accuracies.title and "number of distinct solutions" in differences.title


def test_only_shared_problems_are_compared_and_one_model_has_no_differences(tmp_path):
    write(tmp_path, "a", "b", {"pass_at_1": [1.0, 0.0]}, ids=[3, 4])
    write(tmp_path, "c", "b", {"pass_at_1": [1.0, 1.0]}, ids=[4, 5])
    table = difference_table(read_results([tmp_path / "a", tmp_path / "c"]))
    assert table.rows == (("c", ("+100.0 (+100.0 to +100.0)*",)),)
    assert difference_table(read_results([tmp_path / "a"])) is None


def test_both_formats_have_every_number(results, tmp_path):
    write_table(results, tmp_path / "table.md")
    write_table(results, tmp_path / "table.tex")
    for text in ((tmp_path / "table.md").read_text(), (tmp_path / "table.tex").read_text()):
        for cell in [cell for _, cells in accuracy_table(read_results(results)).rows for cell in cells]:
            assert cell in text
        assert "grpo" in text and "pass@1" in text
    text = (tmp_path / "table.tex").read_text()
    assert r"\multicolumn{2}{c}{math500}" in text and r"aime\_24" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    widths = {line.count("&") for line in text.splitlines() if "&" in line and "multicolumn" not in line}
    assert widths == {3, 2}


def test_columns_of_a_benchmark_are_together_in_latex(tmp_path):
    write(tmp_path, "m", "a", {"pass_at_1": [0.1]})
    write(tmp_path, "m", "b", {"pass_at_1": [0.2]})
    write(tmp_path, "n", "a", {"pass_at_1": [0.3], "maj_at_8": [0.4]})
    write_table([tmp_path / "m", tmp_path / "n"], tmp_path / "table.tex")
    lines = (tmp_path / "table.tex").read_text().splitlines()
    assert r" & \multicolumn{2}{c}{a} & \multicolumn{1}{c}{b} \\" in lines
    assert r"Model & pass@1 & maj@8 & pass@1 \\" in lines
    assert r"m & 10.0 & - & 20.0 \\" in lines and r"n & 30.0* & 40.0 & - \\" in lines


def test_the_command_writes_a_table_and_names_what_is_wrong(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["report", "--table", *map(str, results)])
    assert done.exit_code == 0 and done.output.strip() == "table.md" and Path("table.md").is_file()
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        (["empty"], "empty has no summary.json"),
        ([*map(str, results), "--output", "table.html"], "a table is a .md or .tex file"),
        ([str(results[0]), str(results[0])], "there are two results of grpo on math500"),
    ):
        done = CliRunner().invoke(cli.app, ["report", "--table", *arguments])
        assert done.exit_code == 1 and words in done.output.replace("\n", " ")
    (results[0] / "math500/summary.json").write_text('{"metrics": {"pass_at_1": 1}}')
    with pytest.raises(UserError, match="is not the summary of an evaluation"):
        read_results(results)
