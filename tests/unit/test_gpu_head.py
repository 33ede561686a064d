"""The standalone GPU benchmark script works here at toy sizes: with torch only, and with all packages."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
ALONE = """
import sys
for name in ("jaxtyping", "megatron", "pydantic", "transformers", "rich"):
    sys.modules[name] = None
import runpy
sys.path.insert(0, "tools/bench")
sys.argv = ["tools/bench/gpu_head.py", "--device", "cpu", "--small", "--repeats", "1"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_gpu_script_checks_and_measures_the_head_with_torch_only():
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (
        "ratio of an unchanged policy",
        "| toy | 128 | update |",
        "Measured roofline",
        "passes are skipped",
    )
    for row in rows:
        assert row in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="complete passes need megatron-core")
def test_the_gpu_script_also_measures_complete_passes_of_a_small_model_where_possible():
    command = [sys.executable, "tools/bench/gpu_head.py", "--device", "cpu", "--small", "--repeats", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in (
        "old-log-prob pass with Φ (ours)",
        "update pass with the optimizer (ours)",
        "Transformer Engine is skipped",
    ):
        assert row in done.stdout
