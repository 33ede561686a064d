"""`g2rl` from the user's view: its output on each stream and its exit code."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from megatron_g2rl import __version__, cli
from megatron_g2rl.commands import on_ranks
from megatron_g2rl.commands.imports import without_collections

CONFIG = "tests/data/run.yaml"


@pytest.fixture
def g2rl(repository, monkeypatch):
    monkeypatch.chdir(repository)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.setenv(name, "")  # so that variables set by the command are restored after the test
        monkeypatch.delenv(name)
    return lambda *arguments: CliRunner().invoke(cli.app, list(arguments))


def test_a_dry_run_prints_the_complete_configuration_and_the_ledger(g2rl, tmp_path):
    result = g2rl("train", CONFIG, "trainer.steps=7", "optimizer.learning_rate=5e-7", "--dry-run")
    assert result.exit_code == 0
    text, _, ledger = result.stdout.partition("Batch ledger")
    (tmp_path / "again.yaml").write_text(text)
    config = cli.load_config(tmp_path / "again.yaml")
    assert (config.trainer.steps, config.optimizer.learning_rate) == (7, 5e-7)
    assert "updates in the run" in ledger


def test_a_dry_run_for_a_machine_with_gpus_only_warns_on_one_without(g2rl, monkeypatch):
    monkeypatch.setattr("megatron_g2rl.config.checks._has_cuda", lambda: False)
    result = g2rl("train", CONFIG, "policy.device=cuda", "--dry-run")
    assert result.exit_code == 0 and "no CUDA device" in result.stderr
    assert g2rl("train", CONFIG, "policy.device=cuda").exit_code == 2


@pytest.mark.parametrize("arguments", [["trainer.group_sze=2"], ["trainer.group_size=1"], ["trainer.steps=x"]])
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_a_configuration_error_is_one_message_on_stderr_and_exit_code_2(g2rl, arguments, dry_run):
    result = g2rl("train", CONFIG, *arguments, *dry_run)
    assert result.exit_code == 2
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert "trainer." in result.stderr


def test_a_missing_file_is_a_configuration_error(g2rl):
    result = g2rl("train", "nowhere.yaml")
    assert result.exit_code == 2 and "nowhere.yaml" in result.stderr


def test_several_ranks_are_started_with_the_same_arguments(g2rl, monkeypatch):
    started = []
    monkeypatch.setattr(on_ranks, "run_ranks", lambda *arguments: started.append(arguments) or 17)
    result = g2rl("train", CONFIG, "trainer.ranks=2", "trainer.steps=1")
    assert result.exit_code == 17
    assert started == [(2, "megatron_g2rl.cli", ["train", CONFIG, "trainer.ranks=2", "trainer.steps=1"])]


def test_several_ranks_create_a_model_with_the_same_arguments(g2rl, monkeypatch):
    started = []
    monkeypatch.setattr(on_ranks, "run_ranks", lambda *arguments: started.append(arguments) or 17)
    result = g2rl("warm-start", "examples/quickstart/model.yaml", "ranks=2", "steps=1")
    assert result.exit_code == 17
    arguments = ["warm-start", "examples/quickstart/model.yaml", "ranks=2", "steps=1"]
    assert started == [(2, "megatron_g2rl.cli", arguments)]


def test_one_rank_trains_in_this_process_with_the_environment_of_a_rank(g2rl, monkeypatch):
    result, seen = _with_trainer(g2rl, monkeypatch, {})
    assert result.exit_code == 5
    assert (seen["RANK"], seen["WORLD_SIZE"], seen["LOCAL_RANK"]) == ("0", "1", "0")
    assert int(seen["MASTER_PORT"]) > 0 and seen["MASTER_ADDR"]


def test_under_a_launcher_the_process_is_a_rank_regardless_of_trainer_ranks(g2rl, monkeypatch):
    environment = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_PORT": "1234"}
    result, seen = _with_trainer(g2rl, monkeypatch, environment, "trainer.ranks=2")
    assert result.exit_code == 5
    assert {name: seen[name] for name in environment} == environment


def _with_trainer(g2rl, monkeypatch, environment, *overrides):
    """Run `g2rl train` with a trainer that records its environment and returns 5."""
    seen = {}

    class Trainer:
        @staticmethod
        def train(config):
            seen.update(os.environ)
            return 5

    monkeypatch.setitem(sys.modules, "megatron_g2rl.training.trainer", Trainer)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return g2rl("train", CONFIG, *overrides), seen


def test_the_module_and_the_version_work_from_a_shell(repository):
    command = [sys.executable, "-m", "megatron_g2rl.cli", "--version"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"g2rl {__version__}\n" and done.returncode == 0


def test_every_command_works_from_any_folder(tmp_path, repository):
    for arguments in (["--version"], ["train", str(repository / CONFIG), "--dry-run"]):
        command = [sys.executable, "-m", "megatron_g2rl.cli", *arguments]
        environment = os.environ | {"PYTHONPATH": str(repository)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["warm-start"],
        ["report"],
        ["doctor"],
        ["convert", "hf-to-megatron"],
        ["convert", "megatron-to-hf"],
    ],
)
def test_help_shows_examples_that_exist(g2rl, repository, command):
    result = g2rl(*command, "--help")
    assert result.exit_code == 0 and "Examples:" in result.stdout
    examples = [line.split() for line in result.stdout.partition("Examples:")[2].splitlines() if "g2rl" in line]
    assert examples
    for name in {word for line in examples for word in line if word.endswith(".yaml") and "/" in word}:
        assert (repository / name).is_file()


def test_shell_completion_covers_commands_and_keys(monkeypatch):
    variables = {"_G2RL_COMPLETE": "complete_bash", "COMP_WORDS": "g2rl train a.yaml trainer.ste", "COMP_CWORD": "3"}
    result = CliRunner().invoke(cli.app, [], prog_name="g2rl", env=variables)
    assert result.stdout.split() == ["trainer.steps="]


def test_the_command_line_is_the_documented_one():
    commands = dict(typer.main.get_command(cli.app).commands)
    commands |= {f"convert {name}": command for name, command in commands.pop("convert").commands.items()}
    assert {name: {option for p in command.params for option in p.opts} for name, command in commands.items()} == {
        "train": {"config_path", "overrides", "--dry-run"},
        "warm-start": {"config_path", "overrides"},
        "evaluate": {
            *("config_path", "overrides", "--checkpoint", "--benchmark", "--output", "--samples", "--problems"),
            *("--temperature", "--top-p", "--top-k", "--min-p"),
        },
        "analyze": {"config_path", "arguments", "--output"},
        "report": {"runs", "--output", "--table", "--baseline", "--evaluations"},
        "doctor": {"config_path", "overrides"},
        "data": {"config_path", "overrides"},
        "examples": {"folder"},
        "convert hf-to-megatron": {"source", "target", "--dtype", "--overwrite", "--family"},
        "convert megatron-to-hf": {"source", "target", "--dtype", "--shard-size", "--overwrite", "--family"},
        "launch": {
            *("config_path", "overrides", "--cluster", "--nodes", "--segments"),
            *("--dry-run", "--render", "--wait", "--install"),
        },
        "sweep": {"file", "--cluster", "--dry-run", "--wait", "--retry-failed", "--cancel"},
        "status": {"names"},
        "logs": {"run", "--lines", "--follow"},
        "cancel": {"names"},
    }


@pytest.mark.parametrize("collecting", [True, False])
def test_imports_cause_no_garbage_collections_and_later_ones_skip_what_was_imported(collecting):
    before, enabled = gc.get_freeze_count(), gc.isenabled()
    try:
        gc.enable() if collecting else gc.disable()
        with pytest.raises(ImportError), without_collections():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == collecting and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
        gc.enable() if enabled else gc.disable()
