"""The checks for a new GPU machine work on a CPU: every step, and the stop at the first failure."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tools.fuzz.forking import LAUNCHER_VARIABLES, ForkedCommand

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("imports", "layers", "head", "update", "save", "resume", "sync", "agreement", "timings")
HAS_VLLM = importlib.util.find_spec("vllm") is not None
NO_VLLM = pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: docs/install.md")
VLLM = pytest.param("vllm", marks=[NO_VLLM, pytest.mark.same_for_both])
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


def run(output: Path, *arguments: str, script: Path = ROOT / "tools/gpu_check") -> tuple[int, str]:
    """The exit code and the output of a script, forked from this process."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    command = ForkedCommand(arguments, ROOT, output, environment=environment, script=script)
    return command.wait(400), command.read()


@pytest.mark.parametrize("engine", ["transformers", VLLM])
def test_every_step_passes_on_a_cpu(engine, tmp_path):
    code, text = run(tmp_path / "output", "--device", "cpu", "--engine", engine)
    assert code == 0, text
    ran = [line.split()[0] for line in text.splitlines() if " seconds " in line]
    assert tuple(ran) == STEPS and "all steps passed" in text


@pytest.mark.same_for_both
def test_the_first_failure_ends_the_checks(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    code, text = run(tmp_path / "output", script=tmp_path / "broken.py")
    assert code == 1, text
    assert "a number that is too large" in text and "FAILED: head" in text
    assert "the step after a failure" not in text
