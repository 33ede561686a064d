"""One of two ranks is stopped forever, or killed: the run ends, leaves no process, and resumes to the same result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from quickstart_model import quickstart_model

pytestmark = pytest.mark.same_for_both

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_rank_is_stopped_or_killed_ends_completely_and_resumes_equal(tmp_path, environment):
    tool = [sys.executable, str(REPOSITORY / "tools" / "kills.py"), "--folder", str(tmp_path / "kills")]
    tool += ["--processes", "rank 1 stopped,rank 0", "--phases", "rollout", "--"]
    tool.append(f"model.path={quickstart_model()}")
    result = subprocess.run(tool, env=environment, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")] for line in result.stderr.splitlines() if "| rollout |" in line]
    # process, phase, exit code, seconds, lock free, resumed equal, message
    assert [row[:3] + row[4:6] for row in rows] == [
        ["rank 1 stopped", "rollout", "1", "yes", "yes"],
        ["rank 0", "rollout", "1", "yes", "yes"],
    ]
    assert rows[0][6].startswith("rank 1 (process ") and "did not run for 10 s" in rows[0][6]
