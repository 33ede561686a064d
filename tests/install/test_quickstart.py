"""The quickstart from an empty directory, as a new user starts it, with the environment of these tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = ("Makefile", "README.md", "setup.py", "pyproject.toml", "constraints.txt")
FOLDERS = ("megatron_g2rl", "launch", "examples", "tools")


@pytest.mark.timeout(600)
def test_make_quickstart_trains_both_runs_and_reports(tmp_path):
    """Short: a few SFT warm-up steps, and two steps of each method."""
    place = tmp_path / "empty"
    place.mkdir()
    for name in FILES:
        shutil.copy(REPOSITORY / name, place / name)
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    venv = Path(sys.prefix)
    keys = "trainer.steps=2 evaluation.prompts=16 evaluation.every_steps=2"
    command = [
        "make",
        "quickstart",
        f"VENV={venv}",
        f"QUICKSTART_ARGS={keys}",
        "MODEL_ARGS=steps=20",
        f"--old-file={venv}/.installed",
    ]
    environment = os.environ | {"PYTHONPATH": str(place)}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (place / "models/quickstart/config.json").is_file()
    assert (place / "runs/quickstart.html").stat().st_size > 10_000
    for method in ("grpo", "g2rl"):
        lines = (place / f"runs/quickstart_{method}/metrics.jsonl").read_text().splitlines()
        assert len({json.loads(line)["step"] for line in lines}) == 2
