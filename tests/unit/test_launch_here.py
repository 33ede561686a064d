"""A run on this machine needs neither Slurm nor nemo-run; it is known to others while it goes on, and can be ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_g2rl.cli import app

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "arithmetic.yaml"
PROGRAM = "trap 'echo saving; exit 75' TERM; echo begun; while ! [ -e go ]; do sleep 0.05; done; echo done"


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("G2RL_LAUNCH_PYTHON", "/nowhere/python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.yaml").write_text(f'executor: local\nretries: 0\ncommand: [bash, -c, "{PROGRAM}"]\n')
    return ["launch", str(QUICKSTART), "--cluster", "here.yaml", "run.directory=runs", "run.name=mine"]


@pytest.fixture
def started(words, tmp_path):
    """A run that has begun; it is over at the end of the test."""
    command = [sys.executable, "-m", "megatron_g2rl.cli", *words]
    environment = os.environ | {"PYTHONPATH": str(QUICKSTART.parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout.readline() == "begun\n"
    yield process
    (tmp_path / "go").touch()
    process.wait(30)


def g2rl(*words: str) -> str:
    return CliRunner().invoke(app, words).output


def test_a_run_is_seen_while_it_goes_on_cannot_be_started_twice_and_ends_with_its_exit_code(words, started, tmp_path):
    assert "mine  running" in g2rl("status") and "mine  running" in g2rl("status", "runs/mine")
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 1 and "mine is already running" in again.output
    (tmp_path / "go").touch()
    assert started.wait(30) == 0 and "done" in started.stdout.read()
    assert "mine  finished" in g2rl("status")


def test_a_rendered_script_is_seen_and_not_started_twice_either(words, tmp_path):
    assert "start it with: bash job.sh" in g2rl(*words, "--render", "job.sh")
    script = subprocess.Popen(["bash", "job.sh"], stdout=subprocess.PIPE, text=True)
    try:
        assert script.stdout.readline() == "begun\n" and "mine  running" in g2rl("status")
        twice = subprocess.run(["bash", "job.sh"], capture_output=True, text=True, timeout=30)
        assert twice.returncode == 1 and "is under way already" in twice.stdout
    finally:
        (tmp_path / "go").touch()
    assert script.wait(30) == 0 and "mine  finished" in g2rl("status")


def test_a_file_system_without_locks_keeps_no_run_from_starting(words, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "flock").write_text("#!/bin/sh\nexit 71\n")
    (tmp_path / "bin" / "flock").chmod(0o755)
    (tmp_path / "go").touch()
    g2rl(*words, "--render", "job.sh")
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    assert subprocess.run(["bash", "job.sh"], env=environment, capture_output=True, timeout=30).returncode == 0


def test_cancel_lets_a_run_save_and_ends_it(started):
    assert "mine: cancelled" in g2rl("cancel", "mine")
    assert started.wait(30) == 75 and "saving" in started.stdout.read()
    assert "cancelled (75)" in g2rl("status")


def test_ctrl_c_lets_a_run_save_before_the_command_returns(started, tmp_path):
    started.send_signal(signal.SIGINT)
    said = started.stdout.read()
    assert started.wait(30) != 0 and "saving" in said and "stopping mine; the same command goes on" in said
    deadline = time.monotonic() + 10
    while "stopped (75)" not in (shown := g2rl("status")):
        assert time.monotonic() < deadline, shown
