"""Sweeps: errors name key and line; grid and list define the runs; Slurm keeps the limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from g2rl_launch.sweep import Sweep
from g2rl_launch.sweep_file import load_sweep
from megatron_g2rl.config.errors import ConfigError

CONFIG = Path(__file__).parents[1] / "data" / "run.yaml"


def sweep_file(folder: Path, *lines: str) -> Path:
    file = folder / "many.yaml"
    file.write_text("\n".join([f"config: {CONFIG}", "concurrency: 2", *lines]) + "\n")
    return file


@pytest.mark.parametrize(
    "line, message",
    [
        ("conccurency: 2", "many.yaml:3: unknown key conccurency. Nearest valid key: concurrency"),
        ("grid: {run.sed: [1, 2]}", "many.yaml:3: unknown key run.sed. Nearest valid key: run.seed"),
        ("grid:\n  run.seed: [1, many]", "many.yaml:4: run.seed = 'many' is not allowed"),
        ("grid:\n  run.seed: []", "many.yaml:4: grid.run.seed is not allowed"),
        ("grid: {run.seed: 3}", "many.yaml:3: grid.run.seed is not allowed"),
        ("runs:\n  - run.seed: 1\n  - run.seed: x", "many.yaml:5: run.seed = 'x' is not allowed"),
        ("runs:\n  - run.seed: 1\n  - run.name: x", "many.yaml:5: run.name is set by name:"),
        ("grid: {run.seed: [1]}\nruns: [{run.seed: 2}]", "many.yaml:4: run.seed is under grid: and under runs:"),
        ("overrides: [run.seed=x]", "many.yaml:3: run.seed = 'x' is not allowed"),
        ("overrides: [run.name=x]", "many.yaml:3: run.name is set by name:"),
        ("grid: {run.seed: [1, 2]}\nname: all", "many.yaml:4: several runs are named all"),
        ("grid: {run.seed: [1, 2]}\nname: 'it{trainer.steps}'", "many.yaml:4: {trainer.steps} in name is not a key"),
    ],
)
def test_errors_are_reported_with_key_and_line(tmp_path, line, message):
    with pytest.raises(ConfigError) as error:
        load_sweep(sweep_file(tmp_path, *line.split("\n")))
    assert message in str(error.value)


def test_runs_can_have_different_configurations(tmp_path):
    for name, steps in (("short", 3), ("long", 5)):
        (tmp_path / f"{name}.yaml").write_text(f"base: {CONFIG}\ntrainer: {{steps: {steps}}}\n")
    grid = f"grid:\n  config: [{tmp_path}/short.yaml, {tmp_path}/long.yaml]\n  run.seed: [0, 1]\n"
    (tmp_path / "many.yaml").write_text("name: 'of_{config}_{seed}'\n" + grid)
    _, points = load_sweep(tmp_path / "many.yaml")
    assert [point.name for point in points] == ["of_short_0", "of_short_1", "of_long_0", "of_long_1"]
    assert [point.config.trainer.steps for point in points] == [3, 3, 5, 5]
    assert [point.file.name for point in points] == ["short.yaml", "short.yaml", "long.yaml", "long.yaml"]
    assert all(override.startswith(("run.seed=", "run.name=")) for point in points for override in point.overrides)
    (tmp_path / "many.yaml").write_text("grid: {run.seed: [0]}\n")
    with pytest.raises(ConfigError, match="config is missing"):
        load_sweep(tmp_path / "many.yaml")


def test_runs_start_in_the_order_of_the_grid_so_that_a_stopped_sweep_has_complete_seeds(tmp_path):
    lines = (
        "grid:\n  run.seed: [0, 1]\n  trainer.steps: [3, 5]",
        "runs: [{algorithm.kl_coefficient: 0}, {algorithm.kl_coefficient: 1}]",
    )
    _, points = load_sweep(
        sweep_file(tmp_path, *lines, "name: '{run.seed}_{trainer.steps}_{algorithm.kl_coefficient}'")
    )
    order = [(point.config.run.seed, point.config.trainer.steps) for point in points]
    assert order == [(seed, steps) for seed in (0, 1) for steps in (3, 5) for _ in range(2)]
    assert [point.config.algorithm.kl_coefficient == 0 for point in points] == [True, False] * 4


def test_the_size_of_a_sweep_is_steps_responses_and_gpu_hours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = "trainer.steps: [10, 30]\n  trainer.prompts_per_step: [2]\n  trainer.group_size: [4]"
    lines = [f"grid:\n  {sizes}", "overrides: [policy.device=auto, trainer.responses_per_update=8]"]
    size = "2 runs, 40 steps, 320 responses without dynamic sampling; "
    assert Sweep(sweep_file(tmp_path, *lines)).cost() == size + "2 GPU hours for each hour that every run takes"
    profile = tmp_path / "cluster.yaml"
    profile.write_text("folder: /work\nnodes: 2\ngpus_per_node: 4\ntime: 1-06\n")
    # 8 GPUs for 30 hours, twice
    cost = Sweep(sweep_file(tmp_path, *lines), str(profile)).cost()
    assert cost == size + "at most 480 GPU hours within the time limits of the jobs, without requeueing"


def test_the_limit_of_concurrent_runs_is_required(tmp_path):
    (tmp_path / "many.yaml").write_text(f"config: {CONFIG}\n")
    with pytest.raises(ConfigError, match="concurrency is missing"):
        Sweep(tmp_path / "many.yaml", "my_cluster")


def test_runs_are_the_product_of_the_grid_and_the_list(tmp_path):
    grid = "grid: {optimizer.learning_rate: [1e-4, 3e-4], run.seed: [1, 2]}"
    runs = (
        "runs: [{algorithm.kl_coefficient: 0}, {algorithm.kl_coefficient: 0.1, data.system_prompt: 'a \"b\" é: {c}'}]"
    )
    file = sweep_file(
        tmp_path, "overrides: [trainer.steps=7]", grid, runs, "name: 'k{kl_coefficient}_{learning_rate}_{run.seed}'"
    )
    sweep, points = load_sweep(file)
    assert sweep.concurrency == 2 and len(points) == 8 and len({point.name for point in points}) == 8
    last = points[-1]
    assert last.name == "k0.1_0.0003_2" and last.config.run.name == last.name
    config = last.config
    assert (config.optimizer.learning_rate, config.run.seed, config.trainer.steps) == (3e-4, 2, 7)
    assert config.data.system_prompt == 'a "b" é: {c}' and last.overrides[0] == "trainer.steps=7"


def test_names_are_made_from_the_varying_keys_without_a_template(tmp_path):
    _, points = load_sweep(sweep_file(tmp_path, "grid: {run.seed: [1, 2], data.shuffle: [true, false]}"))
    assert [point.name for point in points][:2] == ["many-seed_1-shuffle_true", "many-seed_1-shuffle_false"]


def test_shipped_sweeps_are_valid(monkeypatch):
    monkeypatch.chdir(CONFIG.parents[2])
    files = sorted(Path("launch/sweeps").glob("*.yaml"))
    assert files and all(load_sweep(file)[1] for file in files)
