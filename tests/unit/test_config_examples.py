"""Every shipped YAML file is read and checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from g2rl_launch.sweep_file import load_sweep
from megatron_g2rl.config.checks import check_config
from megatron_g2rl.config.errors import ConfigError
from megatron_g2rl.config.ledger import batch_ledger
from megatron_g2rl.config.loading import load_config
from megatron_g2rl.config.warm_start import load_warm_start

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SWEEPS = sorted(file for file in EXAMPLES.glob("*/**/*.yaml") if "grid" in yaml.safe_load(file.read_text()))
RUNS = sorted(file for file in EXAMPLES.glob("*/**/*.yaml") if file.name != "model.yaml" and file not in SWEEPS)
MODELS = sorted(EXAMPLES.glob("*/**/model.yaml"))
BASES = sorted(EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("file", RUNS, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_a_shipped_configuration_can_run_after_the_warm_starts(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model in MODELS:
        load_warm_start(model).output.mkdir(parents=True)
    config = load_config(file)
    check_config(config, ranks=config.trainer.ranks)
    assert batch_ledger(config, config.trainer.ranks)


@pytest.mark.parametrize("file", BASES, ids=lambda file: file.name)
def test_a_shipped_base_lacks_only_the_model(file):
    check_config(load_config(file, ["model.path=org/model"]), ranks=8)
    with pytest.raises(ConfigError, match=r"model\.path is missing"):
        load_config(file)


def test_every_run_of_the_quickstart_starts_from_the_model_of_its_warm_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the model does not exist
    for file in EXAMPLES.glob("quickstart/*.yaml"):
        if file not in MODELS:
            with pytest.raises(ConfigError, match=rf"To create it: g2rl warm-start {file.parent}/model\.yaml"):
                check_config(load_config(file))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_every_run_of_a_shipped_sweep_can_run_after_the_warm_starts(file, tmp_path, monkeypatch):
    for model in MODELS:
        (tmp_path / load_warm_start(model).output).mkdir(parents=True)
    monkeypatch.chdir(EXAMPLES.parent)  # the paths in the files start there
    _, points = load_sweep(file)
    assert len(points) > 1
    monkeypatch.chdir(tmp_path)
    for point in points:
        assert batch_ledger(point.config, point.config.trainer.ranks)
        check_config(point.config, ranks=point.config.trainer.ranks)


def test_shipped_runs_do_not_overwrite_each_other():
    names = [load_config(file).run.name for file in RUNS]
    assert len(names) == len(set(names)) > 0


@pytest.mark.parametrize("folder", ["quickstart", "qwen3_1.7b_math", "qwen3_4b_math"])
def test_grpo_differs_from_g2rl_only_in_the_exploration_method_and_the_name(folder):
    g2rl, grpo = (load_config(EXAMPLES / folder / f"{name}.yaml").model_dump() for name in ("g2rl", "grpo"))
    g2rl["run"]["name"], g2rl["exploration"]["method"] = grpo["run"]["name"], "none"
    assert g2rl == grpo
