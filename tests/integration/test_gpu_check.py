"""The checks for a new GPU machine work on a CPU: every step, and the stop at the first failure."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("imports", "layers", "head", "update", "save", "resume", "sync", "agreement", "timings")
ENGINES = ["transformers"] + ["vllm"] * (importlib.util.find_spec("vllm") is not None)
BROKEN = """
import sys
sys.path.insert(0, "tools/gpu_check")
import steps

def head(check):
    return [steps.below("a number that is too large", 2.0, 1.0)]

def update(check):
    raise AssertionError("the step after a failure was run")

steps.STEPS = (steps.imports, head, update)
sys.argv = ["gpu_check", "--device", "cpu", "--engine", "transformers"]
import runpy
runpy.run_path("tools/gpu_check/__main__.py", run_name="__main__")
"""


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_every_step_passes_on_a_cpu(engine):
    done = run("tools/gpu_check", "--device", "cpu", "--engine", engine)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [line.split()[0] for line in done.stdout.splitlines() if " seconds " in line]
    assert tuple(ran) == STEPS and "all steps passed" in done.stdout


def test_the_first_failure_ends_the_checks():
    done = run("-c", BROKEN)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "a number that is too large" in done.stdout and "FAILED: head" in done.stdout
    assert "the step after a failure" not in done.stdout + done.stderr
