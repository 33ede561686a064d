"""One of two ranks is stopped forever, or killed: the run ends, leaves no process, and resumes to the same result."""

from __future__ import annotations

import pytest
from quickstart_model import quickstart_model

pytestmark = pytest.mark.same_for_both


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_rank_is_stopped_or_killed_ends_completely_and_resumes_equal(tmp_path, run_tool, capsys):
    options = ["--folder", str(tmp_path / "kills"), "--processes", "rank 1 stopped,rank 0", "--phases", "rollout"]
    code = run_tool("kills", *options, "--", f"model.path={quickstart_model()}")
    output = capsys.readouterr()
    assert code == 0, output.out[-3000:] + output.err[-3000:]
    rows = [[cell.strip() for cell in line.split("|")] for line in output.err.splitlines() if "| rollout |" in line]
    # process, phase, exit code, seconds, lock free, resumed equal, message
    assert [row[:3] + row[4:6] for row in rows] == [
        ["rank 1 stopped", "rollout", "1", "yes", "yes"],
        ["rank 0", "rollout", "1", "yes", "yes"],
    ]
    assert rows[0][6].startswith("rank 1 (process ") and "did not run for 20 s" in rows[0][6]
