"""`make test` reports what it ran, with which Python, and what it could not run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

TEST = "import sys\ndef test_it():\n    assert {verdict}\n"


@pytest.fixture
def tree(tmp_path, repository):
    """A checkout with two small tests, and the environment of these tests."""
    for folder in ("tools", "tests/unit", "tests/distributed", "tests/integration", "tests/install", "venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "tools/run_tests.py").write_text((repository / "tools/run_tests.py").read_text())
    for name in ("setup.py", "constraints.txt", "tools/install.py"):
        (tmp_path / name).touch()
    (tmp_path / "tests/install/test_quickstart.py").touch()
    (tmp_path / "venv/bin/python").symlink_to(sys.executable)
    (tmp_path / "venv/pyvenv.cfg").write_text("")

    def run(verdict: str = "True"):
        (tmp_path / "tests/unit/test_one.py").write_text(TEST.format(verdict=verdict))
        # No other Python: neither on the PATH nor from pyenv or uv.
        environment = os.environ | {"PATH": str(tmp_path), "HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
        environment["G2RL_LAUNCH_PYTHON"] = sys.executable  # nothing is installed
        environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if "site-packages" in path)}
        command = [sys.executable, "tools/run_tests.py", "venv", "-q", "-p", "no:cacheprovider"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_one_python_is_enough_and_the_missing_one_is_reported(tree):
    done = tree()
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[-1] == "1 passed, 0 failed"
    (ran,) = [line for line in lines if line.endswith(" s") and ": 1 passed, 0 failed" in line]
    assert ran.startswith("Python 3.") and "megatron-core 0." in ran
    assert lines[-2].startswith("not run: the combination with Python 3.")


def test_a_failure_is_counted_and_is_the_exit_code(tree):
    done = tree("False")
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "0 passed, 1 failed"


@pytest.mark.parametrize("verdict, passed, code", [("True", 2, 0), ("False", 1, 1)])
def test_a_failure_of_the_parallel_part_counts_too(verdict, passed, code, tree, tmp_path):
    (tmp_path / "tests/slurm").mkdir()
    (tmp_path / "tests/slurm/test_wait.py").write_text(TEST.format(verdict=verdict))
    done = tree()
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{passed} passed, {2 - passed} failed"
