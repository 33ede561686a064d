"""Runs the tests with every supported combination of Python and megatron-core for which this machine has a Python.

    python tools/run_tests.py .venv [--plain-index] [PYTEST ARGUMENTS]

The environment of the Makefile runs all tests, those that mostly wait beside the others. The other combination gets an
environment of its own, VENV/other, installed during the first tests, and runs all that touches Megatron, end-to-end
tests included. With paths among the arguments, both run those. Uses the standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12")
"""The Python of each combination; constraints.txt says which megatron-core it gets."""
QUICKSTART = "tests/install/test_quickstart.py"
"""Once, with the environment that a newcomer gets."""
END_TO_END = ("tests/integration",)
"""Of the second combination; beside the rest of it."""
SECOND = ("tests/distributed", QUICKSTART)
"""What the second combination runs beside unit tests that touch Megatron."""
MOSTLY_WAITING = ("tests/slurm", "tests/install/test_resolve.py")
"""For Slurm and for the package index: they run beside the others."""
TOUCHES_MEGATRON = re.compile(r"megatron_g2rl\.(policy|warm_start|updates|trainer|exploring)|megatron\.core|gpu_head")
PLAIN_INDEX = {"PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}
"""What hides wheels and indexes that a machine adds to the plain package index."""
DESCRIBE = (
    "import importlib.metadata as m, platform as p, torch;"
    "print(f'Python {p.python_version()}, megatron-core {m.version(\"megatron-core\")}, torch {torch.__version__}')"
)


@dataclass
class Outcome:
    """What one combination's tests came to."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    code: int = 0

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.passed} passed, {self.failed} failed, {self.skipped} skipped in {self.seconds:.0f} s"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument("--plain-index", action="store_true", help="install VENV/other from the plain index alone")
    arguments, pytest = parser.parse_known_args()
    venv = arguments.venv.absolute()
    python = venv / "bin" / "python"
    chosen = [argument for argument in pytest if (ROOT / argument.partition("::")[0]).exists()]
    wanted = "3.12" if _output([str(python), "-V"]).split()[1].startswith("3.11.") else "3.11"
    other = find_python(wanted)
    installing = Installing(other, venv / "other", plain_index=arguments.plain_index) if other else None
    beside = Beside(python, pytest, installing) if not chosen else None
    left = (*MOSTLY_WAITING, QUICKSTART) if installing else MOSTLY_WAITING
    outcomes = [run(python, pytest if chosen else [*pytest, *(f"--ignore={path}" for path in left)])]
    notes = []
    if beside is not None:
        beside.first_is_done.set()
    if installing is None:
        notes.append(f"not run: the combination with Python {wanted}, which this machine does not have")
    elif second := installing.wait():
        outcomes.append(run(second, pytest if chosen else [*pytest, *SECOND, *megatron_tests()]))
    else:
        outcomes.append(Outcome(f"Python {wanted}: its environment could not be installed", failed=1, code=1))
    if beside is not None:
        outcomes += beside.finish()
    print("\nWhat ran:")
    for line in [*outcomes, *notes]:
        print(line)
    print(f"{sum(o.passed for o in outcomes)} passed, {sum(o.failed for o in outcomes)} failed", flush=True)
    return next((outcome.code for outcome in outcomes if outcome.code), 0)


def megatron_tests() -> list[str]:
    """The unit tests that import code built on Megatron."""
    files = sorted((ROOT / "tests/unit").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if TOUCHES_MEGATRON.search(file.read_text())]


def find_python(version: str) -> str | None:
    """A Python that runs: on the path (a shim of pyenv's may not), else among those that pyenv or uv installed."""
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
    """An environment of the lock, in the making beside the first combination's tests, at the lowest priority."""

    def __init__(self, python: str, venv: Path, *, plain_index: bool):
        self.venv, self.stamp, self.log = venv, venv / ".installed", venv.with_name(f"{venv.name}.log")
        sources = (ROOT / "setup.py", ROOT / "constraints.txt", ROOT / "tools/install.py")
        self.python = venv / "bin" / "python"
        self.process: subprocess.Popen | None = None
        if self.stamp.exists() and self.stamp.stat().st_mtime >= max(source.stat().st_mtime for source in sources):
            return
        environment = os.environ | (PLAIN_INDEX if plain_index else {})
        command = ["nice", "-n", "19", python, str(ROOT / "tools/install.py"), str(venv)]
        self.start = time.monotonic()
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    @property
    def installed(self) -> bool:
        """Whether it is complete; `join` comes before."""
        return self.process is None or self.process.returncode == 0

    def join(self) -> None:
        """Wait until nothing more is installed."""
        if self.process is not None:
            self.process.wait()

    def wait(self) -> Path | None:
        """The Python of the finished environment; None: it could not be installed, and the reason was printed."""
        if self.process is not None:
            code = self.process.wait()
            print(f"\n{self.venv} after {time.monotonic() - self.start:.0f} s:\n{self.log.read_text()}", flush=True)
            if code:
                return None
            self.stamp.touch()
        return self.python


class Beside:
    """Runs tests beside those of `main`, one kind after another, once the second environment is installed."""

    def __init__(self, python: Path, pytest: list[str], installing: Installing | None):
        self.log = python.parents[1] / "beside.log"
        self.first_is_done = threading.Event()
        """The first combination's other tests have ended: vLLM's engines of two runs would share names in /dev/shm."""
        self._jobs: list[Outcome] = []
        self._error: BaseException | None = None

        def work() -> None:
            try:
                if installing is not None:
                    installing.join()
                with self.log.open("w") as file:
                    self._run(python, pytest, MOSTLY_WAITING, file)
                    if installing is not None and installing.installed:
                        self.first_is_done.wait()
                        self._run(installing.python, pytest, END_TO_END, file)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def _run(self, python: Path, pytest: list[str], paths: tuple[str, ...], file: TextIO) -> None:
        if there := [path for path in paths if (ROOT / path).exists()]:
            self._jobs.append(run(python, [*pytest, *there], file, ", ".join(there)))

    def finish(self) -> list[Outcome]:
        """What came of them; their output is printed."""
        self._thread.join()
        print(self.log.read_text() if self.log.exists() else "", flush=True)
        if self._error is not None:
            raise self._error
        return self._jobs


def run(python: Path, pytest: list[str], log: TextIO | None = None, what: str = "") -> Outcome:
    """Run pytest with a Python and count what came of it.

    Args:
        python: of the environment.
        pytest: its arguments.
        log: where its output goes; None: to where this process writes.
        what: names a part of the tests.
    """
    outcome = Outcome(_output([str(python), "-W", "ignore", "-c", DESCRIBE]).strip())
    if log is None:
        print(f"\n{outcome.name}", flush=True)
    outcome.name += f" ({what})" if what else ""
    results, start = python.parents[1] / ("beside.xml" if log else "tests.xml"), time.monotonic()
    results.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", f"--junitxml={results}", *pytest]
    if log is not None:
        command += ["-p", "no:cacheprovider"]  # two of them would write one cache
    outcome.code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log).returncode
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
