"""Without a cluster, a sweep runs on this machine: one run after another, resumed by the same command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from g2rl_launch import sweep as sweeping
from g2rl_launch.sweep import Sweep

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "data" / "run.yaml"
PROGRAM = """#!{python}
import os, pathlib, signal, sys, time
folder = pathlib.Path("{folder}")
seed = next(word.partition("=")[2] for word in sys.argv if word.startswith("run.seed="))

def save(*_):
    print("saving", flush=True)
    (folder / f"busy.{{seed}}").unlink()
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
print("arguments", *sys.argv[1:], flush=True)
(folder / f"busy.{{seed}}").touch()
with (folder / "seen").open("a") as file:
    file.write(f"{{seed}}:{{len(list(folder.glob('busy.*')))}} ")
while not (folder / "go").exists():
    time.sleep(0.02)
(folder / f"busy.{{seed}}").unlink()
print("no luck" if seed == "1" else "done")
sys.exit(3 if seed == "1" and not (folder / "fixed").exists() else 0)
"""
COMMAND = """
import pathlib, sys
from g2rl_launch import sweep as sweeping
from g2rl_launch.sweep import Sweep
sweeping.CALLER = sys.argv[2]
Sweep(pathlib.Path(sys.argv[1])).submit(False, lambda line: print(line, flush=True))
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Path:
    """A sweep of three runs whose program is a stand-in that waits for the file `go`."""
    program = tmp_path / "program"
    program.write_text(PROGRAM.format(python=sys.executable, folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setattr(sweeping, "CALLER", str(program))
    monkeypatch.chdir(tmp_path)
    lines = [f"config: {CONFIG}", "grid: {run.seed: [0, 1, 2]}", "name: s{seed}"]
    (tmp_path / "many.yaml").write_text("\n".join([*lines, "overrides: [run.directory=runs, trainer.steps=5]"]) + "\n")
    return tmp_path / "many.yaml"


@pytest.fixture
def started(sweep, tmp_path):
    """The sweep in a separate process, with its first run started; everything has ended after the test."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'launch'}"}
    command = [sys.executable, "-c", COMMAND, str(sweep), str(tmp_path / "program")]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    wait_until((tmp_path / "busy.0").exists)
    yield process
    (tmp_path / "go").touch()
    process.wait(200)


def wait_until(true) -> None:
    deadline = time.monotonic() + 200
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def states(file: Path) -> list[str]:
    return [status.state for status in Sweep(file).statuses().values()]


def submit(file: Path, retry_failed: bool = False) -> list[str]:
    lines: list[str] = []
    Sweep(file).submit(retry_failed, lines.append)
    return [line.partition(":")[0] for line in lines if "started" in line]


def test_runs_execute_one_after_another_and_failed_ones_are_retried_only_on_request(sweep, tmp_path):
    (tmp_path / "go").touch()
    assert states(sweep) == ["not launched"] * 3
    assert submit(sweep) == ["s0", "s1", "s2"]
    assert (tmp_path / "seen").read_text() == "0:1 1:1 2:1 "
    assert states(sweep) == ["finished", "failed (3)", "finished"]
    many = Sweep(sweep)
    assert many.statuses()["s1"].note == "no luck"
    assert "2 finished, 1 failed (3)" in many.table(many.statuses()).caption
    log = (tmp_path / "runs" / "s0" / "launch" / "log-1-0.out").read_text()
    assert f"arguments -m megatron_g2rl.cli train {CONFIG} run.directory=runs" in log and "run.name=s0" in log
    assert submit(sweep) == []
    (tmp_path / "fixed").touch()
    assert submit(sweep, retry_failed=True) == ["s1"] and states(sweep) == ["finished"] * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_current_run_save_and_the_same_command_resumes(started, sweep, tmp_path, number):
    assert states(sweep) == ["running", "not launched", "not launched"]
    started.send_signal(number)
    assert started.wait(200) != 0
    assert "saving" in (tmp_path / "runs" / "s0" / "launch" / "log-1-0.out").read_text()
    assert states(sweep) == ["stopped (75)", "not launched", "not launched"]
    (tmp_path / "go").touch()
    assert submit(sweep) == ["s0", "s1", "s2"]


def test_a_run_that_outlives_a_killed_sweep_is_awaited_and_then_resumed(started, sweep, tmp_path):
    started.kill()
    started.wait()
    assert states(sweep) == ["running", "not launched", "not launched"]
    (tmp_path / "go").touch()
    assert submit(sweep) == ["s0", "s1", "s2"]
    assert (tmp_path / "seen").read_text() == "0:1 0:1 1:1 2:1 "
    assert states(sweep) == ["finished", "failed (3)", "finished"]
