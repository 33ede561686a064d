"""Which settings a resumed run may change, and when sampled responses can be reused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_g2rl.config import renamed
from megatron_g2rl.config.changes import changes, check_changes, fingerprint
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.loading import load_config

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "arithmetic.yaml"


def config(*overrides: str):
    return load_config(QUICKSTART, overrides)


def saved(*overrides: str) -> dict:
    return config(*overrides).model_dump(mode="json")


def test_an_unchanged_configuration_has_no_changes():
    assert changes(saved(), config()) == []
    assert changes(saved("evaluation=null"), config("evaluation=null")) == []


def test_a_configuration_saved_with_the_old_name_of_a_key_has_no_changes():
    before = saved("checkpoint.on_corruption=previous")
    before["checkpoint"]["on_damage"] = before["checkpoint"].pop("on_corruption")
    assert changes(before, config("checkpoint.on_corruption=previous")) == []


def test_the_value_of_a_renamed_key_is_compared_under_its_new_name(monkeypatch):
    monkeypatch.setitem(renamed.KEYS, "algorithm.clip_upper", "algorithm.clip_high")
    before = saved("algorithm.clip_high=0.3")
    before["algorithm"]["clip_upper"] = before["algorithm"].pop("clip_high")
    assert changes(before, config("algorithm.clip_high=0.3")) == []
    assert [change.key for change in changes(before, config())] == ["algorithm.clip_high"]


def test_every_changed_key_is_listed_with_both_values():
    found = check_changes(saved(), config("optimizer.learning_rate=3e-4", "trainer.steps=7"), "step_1")
    assert [str(change) for change in found] == ["optimizer.learning_rate: 0.0001 -> 0.0003", "trainer.steps: 60 -> 7"]


def test_output_folders_and_saving_settings_may_change():
    assert changes(saved(), config("run.name=x", "checkpoint.keep=9", "logging.tensorboard=false")) == []


@pytest.mark.parametrize(
    "override",
    ["run.seed=5", "algorithm.clip_high=0.3", "exploration.strength=0.1", "trainer.group_size=4", "model.path=org/x"],
)
def test_a_key_that_would_make_it_another_run_is_refused_by_name(override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"step_1 was saved with a different configuration(.|\n)*- {key}"):
        check_changes(saved(), config(override), "step_1")


def test_a_run_of_an_earlier_version_with_a_built_in_model_is_refused_by_the_name_of_its_model():
    before = saved("model.path=builtin:tiny") | {"warm_start": {"steps": 300}}
    with pytest.raises(ConfigError, match=r"allow_changed=model\.path:\n  - model\.path: \"builtin:tiny\" -> [^\n]*$"):
        check_changes(before, config(), "step_1")


def test_a_refused_key_can_be_allowed_by_name_without_allowing_others():
    allow = "checkpoint.allow_changed=run.seed"
    assert len(check_changes(saved(), config("run.seed=5", allow), "step_1")) == 1
    with pytest.raises(ConfigError) as error:
        check_changes(saved(), config("run.seed=5", "trainer.group_size=4", allow), "step_1")
    assert "trainer.group_size: 8 -> 4" in str(error.value) and "run.seed" not in str(error.value)


@pytest.mark.parametrize(
    "written", ["run.seed,trainer.group_size", "run.seed, trainer.group_size ,", "[run.seed, trainer.group_size]"]
)
def test_several_keys_are_a_list_or_one_text(written):
    names = config(f"checkpoint.allow_changed={written}").checkpoint.allow_changed
    assert names == ("run.seed", "trainer.group_size")


def test_the_configuration_of_an_older_run_may_allow_no_changes_with_an_empty_text(tmp_path):
    (tmp_path / "old.yaml").write_text(f"base: {QUICKSTART}\ncheckpoint: {{allow_changed: ''}}\n")
    assert load_config(tmp_path / "old.yaml").checkpoint.allow_changed == ()


def test_an_unknown_key_cannot_be_allowed():
    with pytest.raises(ConfigError, match="allow_changed: no such configuration key: seed"):
        check_changes(saved(), config("checkpoint.allow_changed=seed"), "step_1")


def test_keys_missing_from_an_older_checkpoint_count_as_their_defaults():
    old = saved()
    del old["algorithm"]["ratio"]
    assert changes(old, config()) == []
    assert [c.key for c in changes(old, config("algorithm.ratio=sequence"))] == ["algorithm.ratio"]


def test_responses_are_reused_only_under_the_same_learning_settings():
    assert fingerprint(config()) == fingerprint(config("run.name=x", "policy.tensor_parallel=2", "checkpoint.keep=9"))
    assert fingerprint(config()) != fingerprint(config("optimizer.learning_rate=3e-4"))


def test_a_run_of_before_the_fused_update_resumes_with_its_default_and_reuses_its_responses():
    exact, auto = "exploration.source=exact", "exploration.source=auto"
    assert config().exploration.source == "auto"
    for before, now in ((exact, auto), (auto, exact)):
        assert [change.key for change in check_changes(saved(before), config(now), "step_1")] == ["exploration.source"]
        assert fingerprint(config(before)) == fingerprint(config(now))
    with pytest.raises(ConfigError, match='exploration.source: "exact" -> "sampler_topk"'):
        check_changes(saved(exact), config("exploration.source=sampler_topk"), "step_1")
    assert fingerprint(config()) != fingerprint(config("exploration.source=sampler_topk"))
