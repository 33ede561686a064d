"""Launch commands re-execute in the launch environment, which imports both packages wherever they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from g2rl_launch import submit
from g2rl_launch.install import PACKAGES, link
from megatron_g2rl.config.errors import ConfigError

ROOT = Path(__file__).parents[2]
PYTHON = '#!/bin/sh\nshift\necho "called by $G2RL_PYTHON:" "$@"\n'

LOOK = """
import importlib.util, pathlib, runpy, sys
program, sys.argv = sys.argv[1], ["g2rl", "status"]
try:
    runpy.run_path(program, run_name="__main__")
except SystemExit:
    import megatron_g2rl
    print(pathlib.Path(megatron_g2rl.__file__).parent)
    print(importlib.util.find_spec("nemo_run"))
"""
"""Runs a program and prints what it has imported, and whether it can find a package."""


@pytest.fixture
def g2rl(tmp_path):
    """Run g2rl in a process with a stand-in for the launch environment's Python; returns its output."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    folders = dict(XDG_STATE_HOME=str(tmp_path / "state"), XDG_CACHE_HOME=str(tmp_path / "cache"))

    def run(*words: str, python: str = str(python)) -> str:
        environment = os.environ | folders | dict(G2RL_LAUNCH_PYTHON=python, PYTHONPATH=str(ROOT))
        command = [sys.executable, "-m", "megatron_g2rl.cli", *words]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize("words", [["status"], ["logs", "a b", "--lines", "3"], ["launch", "x.yaml", "--cluster", "y"]])
def test_launch_commands_re_execute_in_the_launch_environment(g2rl, words):
    assert g2rl(*words) == f"called by {sys.executable}: {' '.join(words)}\n"


@pytest.mark.parametrize("words", [["--version"], ["train", "status"], ["launch", "--help", "--install"]])
def test_other_commands_do_not_use_the_launch_environment(g2rl, words):
    assert "called by" not in g2rl(*words)


def test_without_a_launch_environment_only_submitting_fails(g2rl, tmp_path):
    assert "no run was launched from here" in g2rl("status", python="/nowhere/python")
    (tmp_path / "site.yaml").write_text("account: mine\n")
    config = ROOT / "tests" / "data" / "run.yaml"
    words = ["launch", str(config), "--cluster", "site.yaml"]
    assert "G2RL_LAUNCH_PYTHON=/nowhere/python is not a program" in g2rl(*words, python="/nowhere/python")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Contents of a wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    for name in ("megatron_g2rl", "launch", "examples", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt", "constraints-gpu.txt"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "setup.py", "--quiet", "build_py", f"--build-lib={folder / 'site-packages'}"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "site-packages"


def test_a_wheel_holds_the_launcher_with_its_shell_programs_and_requirements(wheel):
    files = {file.name for file in (ROOT / "launch" / "g2rl_launch").iterdir() if file.is_file()}
    assert {"attempts.sh", "requirements.txt", "__main__.py"} <= files
    assert files == {file.name for file in (wheel / "g2rl_launch").iterdir() if file.is_file()}


def test_the_packages_of_a_wheel_are_imported_without_other_packages_of_its_folder(wheel, tmp_path):
    (wheel / "nemo_run.py").write_text("raise AssertionError('of another environment')\n")
    program = str(wheel / "g2rl_launch" / "__main__.py")

    def run(*command: str) -> str:
        environment = os.environ | dict(XDG_STATE_HOME=str(tmp_path))
        done = subprocess.run([sys.executable, "-I", *command], env=environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert "no run was launched from here" in run(program, "status")
    (tmp_path / "look.py").write_text(LOOK)
    assert run(str(tmp_path / "look.py"), program).splitlines()[-2:] == [str(wheel / "megatron_g2rl"), "None"]


def test_linked_packages_have_their_nemo_run_entry_point_and_linking_again_changes_nothing(tmp_path):
    code = (
        "import g2rl_launch, megatron_g2rl, importlib.metadata as m, sys; "
        "print(g2rl_launch.__file__, [e.value for e in m.entry_points(group='nemo_run.cli') if e.name == 'g2rl'])"
    )
    for _ in range(2):
        link(tmp_path)
        environment = os.environ | dict(PYTHONPATH=str(tmp_path))
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert "g2rl_launch.api" in done.stdout and str(tmp_path / "g2rl_launch") in done.stdout, done.stderr
    assert all((tmp_path / name).resolve() == folder for name, folder in PACKAGES.items())


def test_a_reward_function_is_searched_for_in_the_python_that_g2rl_was_called_with(tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "only_there.py").write_text("def reward(text, answer): return 1.0\n")
    python, path = tmp_path / "python", f"{tmp_path / 'packages'}:{ROOT}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(submit, "CALLER", str(python))
    (tmp_path / "site.yaml").write_text("account: mine\n")

    def launch(function: str) -> submit.Launch:
        config = ROOT / "tests" / "data" / "run.yaml"
        return submit.Launch(config, [f"reward.function={function}"], str(tmp_path / "site.yaml"))

    assert launch("only_there:reward").config.reward.function == "only_there:reward"
    with pytest.raises(ConfigError, match="there is no module not_there to import from"):
        launch("not_there:reward")
