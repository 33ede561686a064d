"""docs/metrics.md is generated from the table, which has every name."""

from __future__ import annotations

import re
import subprocess

from megatron_g2rl.config import renamed
from megatron_g2rl.tracking.table import METRICS, metrics_page, unknown_names

TESTED = ("config_changes", "config_loading", "report", "metric_table")
TESTS_OF_OLD_NAMES = {f"tests/unit/test_{name}.py" for name in TESTED}


def test_the_page_of_all_metrics_is_up_to_date(repository):
    page = (repository / "docs/metrics.md").read_text()
    assert page == metrics_page(), "run `make docs` and commit docs/metrics.md"


def test_every_name_is_in_the_table_once_with_unit_and_meaning():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    assert all(metric.unit and metric.meaning and "/" in metric.name for metric in METRICS)
    assert not any("|" in metric.meaning for metric in METRICS)
    assert all(f"`{name}`" in metrics_page() for name in names)


def test_renamed_metrics_have_new_names_from_the_table():
    assert not unknown_names(renamed.METRICS.values())
    assert set(unknown_names(renamed.METRICS)) == set(renamed.METRICS)
    assert renamed.current_metric("evaluation/majority_at_16") == "evaluation/maj_at_16"
    assert renamed.current_metric("reward/mean") == "reward/mean"


def test_the_changelog_lists_every_renamed_metric_and_key(repository):
    changelog = (repository / "CHANGELOG.md").read_text()
    for old, new in (renamed.METRICS | renamed.KEYS).items():
        assert f"| `{old}` | `{new}` |" in changelog


def test_no_old_name_of_a_metric_or_key_is_left(repository):
    old = "|".join(map(re.escape, [*renamed.METRICS, "evaluation/majority_at_", "on_damage", "majority_at_n"]))
    pattern = re.compile(rf"(?<![\w/])(?:{old})(?![a-z_])")
    names = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True).stdout
    files = [name for name in names.splitlines() if name.endswith((".py", ".md", ".yaml", ".sh", ".jinja"))]
    assert len(files) > 100
    found = {name for name in files if pattern.search((repository / name).read_text())}
    assert found <= {"CHANGELOG.md", "megatron_g2rl/config/renamed.py", *TESTS_OF_OLD_NAMES}


def test_metrics_of_one_subject_are_adjacent():
    subjects = [metric.name.partition("/")[0] for metric in METRICS]
    starts = [a for a, b in zip([None, *subjects], subjects, strict=False) if a != b]
    assert len(starts) == len(set(subjects))


def test_names_outside_the_table_are_found_and_a_family_covers_its_members():
    assert unknown_names(["reward/mean", "evaluation/pass_at_16", "reward/meen", "step_s"]) == ["reward/meen", "step_s"]
