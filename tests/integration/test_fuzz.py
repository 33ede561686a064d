"""A fixed sample of the fuzzer's cases: no command responds to hostile input with a traceback or a hang."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.same_for_both

CASES = 130


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sample_of_hostile_inputs_causes_no_failure(repository, tmp_path):
    command = [sys.executable, "-m", "tools.fuzz", "--seed", "7", "--cases", str(CASES), "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    assert f"{CASES} cases of seed 7, 0 failures" in done.stdout


def test_a_command_that_raises_hangs_or_leaves_processes_is_a_failure(tmp_path):
    """The fuzzer's own checks, on commands that do what is not allowed."""
    code = """
import os, sys, time
from pathlib import Path
from megatron_g2rl.distributed.orphans import adopt_orphans
from tools.fuzz import verdicts, targets
from tools.fuzz.seeds import Seeds

class NoSeeds: pass

def raises(): raise ValueError("seen")
def kills(): os.kill(os.getpid(), 11)
def hangs(): time.sleep(100)
def fills():
    held = bytearray(1000 << 20)
    for place in range(0, len(held), 4096): held[place] = 1
    time.sleep(100)
def leaves(): os.fork() or time.sleep(100)
def says_nothing(): sys.exit(1)
def executes(): Path("executed").touch()
def fine(): sys.exit(2 if print("a message", file=sys.stderr) is None else 0)

adopt_orphans()
# A fork has a part of the pages of this process, some 400 MiB: the limit is above them.
verdicts.GRACE_S, verdicts.MEMORY_BYTES = 4.0, 700 << 20
for deed in (raises, kills, hangs, fills, leaves, says_nothing, executes, fine):
    verdicts.LIMIT_S = 8.0 if deed is hangs else 100.0
    def make(work, deed=deed):
        work.arguments, work.before = ["--version"], deed
    for name in targets.TARGETS:
        targets.TARGETS[name] = (make, 1)
    verdict = verdicts.run_case(NoSeeds(), 1, 1, Path(sys.argv[1]) / "case")
    print(f"{deed.__name__}: {verdict.failure}", flush=True)
"""
    root = os.getcwd()
    environment = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert found["raises"].startswith("traceback: ValueError"), done.stderr
    assert found["kills"] == "ended by SIGSEGV"
    assert found["hangs"] == "no end after 8 s"
    assert found["fills"].startswith(("used 0.", "used 1."))
    assert found["leaves"].startswith("left 1 processes")
    assert found["says_nothing"] == "exit code 1 without a message"
    assert found["executes"] == "code of an input was executed"
    assert found["fine"] == ""
