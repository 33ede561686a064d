"""docs/metrics.md is the table, and the table holds every name."""

from __future__ import annotations

from megatron_g2rl.config import renamed
from megatron_g2rl.tracking.table import METRICS, metrics_page, unknown_names


def test_the_page_of_all_metrics_is_current(repository):
    page = (repository / "docs/metrics.md").read_text()
    assert page == metrics_page(), "run `make docs` and commit docs/metrics.md"


def test_a_name_is_in_the_table_once_with_unit_and_meaning():
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


def test_metrics_of_one_subject_stand_together():
    subjects = [metric.name.partition("/")[0] for metric in METRICS]
    starts = [a for a, b in zip([None, *subjects], subjects, strict=False) if a != b]
    assert len(starts) == len(set(subjects))


def test_names_outside_the_table_are_found_and_a_family_covers_its_members():
    assert unknown_names(["reward/mean", "evaluation/pass_at_16", "reward/meen", "step_s"]) == ["reward/meen", "step_s"]
