"""Run the tests with every supported combination of Python and megatron-core whose Python is installed here.

    python tools/run_tests.py .venv [--plain-index] [PYTEST ARGUMENTS]

The Makefile's environment, created with the Python that runs this script, runs all tests. The other combination gets a
separate environment, VENV/other, and runs the tests that use Megatron, end-to-end tests included. If the arguments
contain paths, both run only those. Lanes (one-rank tests, the other combination, tests that mostly wait) run
concurrently with the remaining tests; their output is printed at the end. VENV/launch, the environment for launching
jobs, is installed for the tests that need it. Uses only the standard library.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12")
"""The Python of each combination; constraints.txt determines its megatron-core version."""
QUICKSTART = "tests/install/test_quickstart.py"
"""Runs once, with the environment that a new user gets."""
SECOND = ("tests/distributed", "tests/integration", QUICKSTART)
"""Tests of the second combination, in addition to the unit tests that use Megatron."""
SLURM = "tests/slurm"
"""Needs the environment for launching jobs."""
ONE_RANK = ("tests/unit", "tests/parity", "tests/install/test_resolve.py")
"""A separate lane, so that all lanes take about the same time."""
_FORKING = ("documented_commands", "evaluate", "fuzz", "kills", "report_browser")
MOSTLY_WAITING = (
    *(f"tests/integration/test_{name}.py" for name in _FORKING),
    SLURM,
)
"""Tests that wait for Slurm, and others, so that all lanes take about the same time.

The others fork commands from pytest's process. They come first, and not in the lane of the unit tests: commands that
were forked after those did not end."""
NOT_TWICE = ("-m", "not same_for_both")
"""The second combination skips tests with this marker: those of what does not depend on megatron-core's version."""
TOUCHES_MEGATRON = re.compile(r"megatron_g2rl\.(policy|training)|megatron\.core")
SAME_FOR_BOTH = ("test_megatron_contract.py",)
"""Unit tests that read the sources of all versions, whichever is installed."""
NO_TESTS = 5
"""pytest's exit code when it selects no tests, for example because of `-k`."""
PLAIN_INDEX = {"PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}
"""Environment that disables a machine's additional wheels and indexes, so that only the plain package index is used."""
DESCRIBE = (
    "import importlib.metadata as m, platform as p;"
    'print(f\'Python {p.python_version()}, megatron-core {m.version("megatron-core")}, torch {m.version("torch")}\')'
)


@dataclass
class Outcome:
    """Test results of one combination."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    code: int = 0
    log: Path | None = None
    """File with pytest's output; None if it went to this process's output."""

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.passed} passed, {self.failed} failed, {self.skipped} skipped in {self.seconds:.0f} s"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument("--plain-index", action="store_true", help="install VENV/other from the plain index alone")
    parser.add_argument("--lint", action="store_true", help="run ruff before the tests")
    arguments, pytest = parser.parse_known_args()
    venv = arguments.venv.absolute()
    python = venv / "bin" / "python"
    chosen = [argument for argument in pytest if (ROOT / argument.partition("::")[0]).exists()]
    base = str(python) if python.exists() else sys.executable
    wanted = "3.12" if _output([base, "-V"]).split()[1].startswith("3.11.") else "3.11"
    other = find_python(wanted)
    venv.mkdir(parents=True, exist_ok=True)
    own = Installing(sys.executable, venv, quiet=False)
    installing = Installing(other, venv / "other", plain_index=arguments.plain_index) if other else None
    if not own.finish():
        if installing and installing.process:
            installing.process.terminate()
        return 1
    if arguments.lint and (code := subprocess.run([venv / "bin" / "ruff", "check", "."], cwd=ROOT).returncode):
        return code
    launching = launch_environment(python, venv / "launch", chosen)
    lanes = []
    if chosen and launching and not launching.finish():
        sys.exit(launching.log.read_text() + "\nthe environment that launches jobs could not be installed")
    if installing:
        lanes.append(Lane("second", lambda: second(installing, wanted, pytest, chosen)))
    if not chosen:
        lanes.append(Lane("waiting", lambda: waiting(python, installing, launching, pytest)))
        one_rank = [*pytest, *(path for path in ONE_RANK if (ROOT / path).exists())]
        lanes.append(Lane("one rank", lambda: run(python, one_rank, lane="one_rank", what=", ".join(ONE_RANK))))
    left = (*MOSTLY_WAITING, *ONE_RANK, *([QUICKSTART] if installing else []))
    outcomes = [run(python, pytest if chosen else [*pytest, *(f"--ignore={path}" for path in left)])]
    outcomes += [outcome for lane in lanes if (outcome := lane.finish())]
    notes = []
    if installing is None:
        notes.append(f"not run: the combination with Python {wanted}, which this machine does not have")
    print("\nWhat ran:")
    for line in [*outcomes, *notes]:
        print(line)
    print(f"{sum(o.passed for o in outcomes)} passed, {sum(o.failed for o in outcomes)} failed", flush=True)
    codes = [outcome.code for outcome in outcomes]
    if all(code in (0, NO_TESTS) for code in codes):
        return 0 if any(outcome.passed for outcome in outcomes) else NO_TESTS
    return next(code for code in codes if code not in (0, NO_TESTS))


def second(installing: Installing, version: str, pytest: list[str], chosen: list[str]) -> Outcome:
    """Run the other combination's tests once its environment is installed."""
    if not installing.finish():
        failed = f"Python {version}: its environment could not be installed"
        return Outcome(failed, failed=1, code=1, log=installing.log)
    all_of_it = [*NOT_TWICE, *pytest, *SECOND, *megatron_tests()]
    return run(installing.python, pytest if chosen else all_of_it, lane="second")


def waiting(
    python: Path, installing: Installing | None, launching: Installing | None, pytest: list[str]
) -> Outcome | None:
    """Run the tests that mostly wait, after all installations: those mostly wait, too."""
    if launching is not None and not launching.finish():
        failed = "the environment that launches jobs could not be installed"
        return Outcome(failed, failed=1, code=1, log=launching.log)
    if installing is not None:
        installing.finish()
    if there := [path for path in MOSTLY_WAITING if (ROOT / path).exists()]:
        return run(python, [*pytest, *there], lane="waiting", what=", ".join(there))
    return None


def launch_environment(python: Path, venv: Path, chosen: list[str]) -> Installing | None:
    """Start installing the environment for launching jobs; None if the tests do not need it or the user has another."""
    own = os.environ.get("G2RL_LAUNCH_PYTHON", str(venv / "bin" / "python")) == str(venv / "bin" / "python")
    needed = (ROOT / SLURM).exists() and (not chosen or any(path.startswith(SLURM) for path in chosen))
    return Installing(str(python), venv, "--launch", lock="constraints-launch.txt") if own and needed else None


def megatron_tests() -> list[str]:
    """The unit tests that import code built on Megatron."""
    files = sorted((ROOT / "tests/unit").glob("test_*.py"))
    files = [file for file in files if file.name not in SAME_FOR_BOTH]
    return [str(file.relative_to(ROOT)) for file in files if TOUCHES_MEGATRON.search(file.read_text())]


def find_python(version: str) -> str | None:
    """A working Python: from PATH (where a pyenv shim may not work), else one installed by pyenv or uv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    uv = Path.home() / ".local/share/uv/python"
    candidates = [shutil.which(f"python{version}")]
    candidates += [str(path / "bin" / f"python{version}") for path in sorted(pyenv.glob(f"{version}.*"), reverse=True)]
    candidates += [str(path / "bin" / f"python{version}") for path in sorted(uv.glob(f"cpython-{version}.*"))]
    for candidate in filter(None, candidates):
        try:
            if _output([candidate, "-V"]).startswith(f"Python {version}."):
                return candidate
        except (OSError, subprocess.CalledProcessError):
            continue
    return None


class Installing:
    """Installation of an environment from a lock file, concurrent with the first combination's tests."""

    def __init__(
        self,
        python: str,
        venv: Path,
        *options: str,
        lock: str = "constraints.txt",
        plain_index: bool = False,
        quiet: bool = True,
    ):
        """Start `tools/install.py` with these options, unless the environment is newer than the files it depends on."""
        self.venv, self.stamp, self.log = venv, venv / ".installed", venv.with_name(f"{venv.name}.log")
        sources = (ROOT / "setup.py", ROOT / lock, ROOT / "tools/install.py")
        self.python = venv / "bin" / "python"
        self.process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        if self.stamp.exists() and self.stamp.stat().st_mtime >= max(source.stat().st_mtime for source in sources):
            return
        environment = os.environ | (PLAIN_INDEX if plain_index else {})
        command = [python, str(ROOT / "tools/install.py"), *options, str(venv)]
        with self.log.open("w") if quiet else contextlib.nullcontext() as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def finish(self) -> bool:
        """Wait until the installation has ended; False if it failed, with the reason in the log."""
        with self._lock:
            if self.process is not None:
                if self.process.wait():
                    return False
                self.stamp.touch()
        return True


class Lane:
    """Work that runs in a thread, concurrent with the first combination's tests."""

    def __init__(self, name: str, work: Callable[[], Outcome | None]):
        """Start `work`; its output goes to a log named after the lane (see `run`)."""
        self.name = name
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None

        def guarded() -> None:
            try:
                self._outcome = work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=guarded, daemon=True)
        self._thread.start()

    def finish(self) -> Outcome | None:
        """Wait for the lane, print its output and return its result."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        if self._outcome is not None and self._outcome.log is not None:
            print(self._outcome.log.read_text(), flush=True)
        return self._outcome


def run(python: Path, pytest: list[str], *, lane: str = "", what: str = "") -> Outcome:
    """Run pytest in an environment and count the results.

    Args:
        python: the environment's Python.
        pytest: arguments of pytest.
        lane: name of the lane, whose output goes to a log in the environment. Empty: to this process's output.
        what: description of the tests, if they are only a part.
    """
    folder, name = python.parents[1], lane or "first"
    outcome = Outcome(_output([str(python), "-W", "ignore", "-c", DESCRIBE]).strip())
    results, start = folder / f"tests-{name}.xml", time.monotonic()
    results.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", f"--junitxml={results}", *pytest]
    if lane:
        # Concurrent lanes must not write to the same cache.
        command += ["-o", f"cache_dir={folder / f'cache-{name}'}"]
        outcome.log = folder / f"tests-{name}.log"
        with outcome.log.open("w") as log:
            log.write(f"\n{outcome.name} {what}\n")
            log.flush()
            outcome.code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode
    else:
        print(f"\n{outcome.name}", flush=True)
        outcome.code = subprocess.run(command, cwd=ROOT).returncode
    outcome.name += f" ({what})" if what else ""
    outcome.seconds = time.monotonic() - start
    if results.exists():
        suite = xml.etree.ElementTree.parse(results).getroot().find("testsuite").attrib
        outcome.failed = int(suite["failures"]) + int(suite["errors"])
        outcome.skipped = int(suite["skipped"])
        outcome.passed = int(suite["tests"]) - outcome.failed - outcome.skipped
    return outcome


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
