"""Runs the tests with every supported combination of Python and megatron-core for which this machine has a Python.

    python tools/run_tests.py .venv [--plain-index] [PYTEST ARGUMENTS]

The environment of the Makefile runs all tests. The other combination gets an environment of its own, VENV/other, and
runs everything but what has nothing to do with Megatron: launching, and resolving the locks. Uses the standard library
only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12")
"""The Python of each combination; constraints.txt says which megatron-core it gets."""
ELSEWHERE = ("tests/slurm", "tests/install/test_resolve.py")
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
    python = arguments.venv / "bin" / "python"
    outcomes, notes = [run(python, pytest)], []
    own = "3.11" if _output([str(python), "-V"]).split()[1].startswith("3.11.") else "3.12"
    wanted = next(version for version in PYTHONS if version != own)
    if other := find_python(wanted):
        python = install(other, arguments.venv / "other", plain_index=arguments.plain_index)
        outcomes.append(run(python, [*pytest, *(f"--ignore={path}" for path in ELSEWHERE), *_launch_tests()]))
    else:
        notes.append(f"not run: the combination with Python {wanted}, which this machine does not have")
    print("\nWhat ran:")
    for line in [*outcomes, *notes]:
        print(line)
    print(f"{sum(o.passed for o in outcomes)} passed, {sum(o.failed for o in outcomes)} failed", flush=True)
    return next((outcome.code for outcome in outcomes if outcome.code), 0)


def _launch_tests() -> list[str]:
    return [f"--ignore={path.relative_to(ROOT)}" for path in sorted((ROOT / "tests/unit").glob("test_launch_*.py"))]


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


def install(python: str, venv: Path, *, plain_index: bool) -> Path:
    """The Python of an environment of the lock, made unless it is there for the present lock."""
    stamp = venv / ".installed"
    sources = (ROOT / "setup.py", ROOT / "constraints.txt", ROOT / "tools/install.py")
    if not stamp.exists() or stamp.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        environment = os.environ | (PLAIN_INDEX if plain_index else {})
        subprocess.run([python, str(ROOT / "tools/install.py"), str(venv)], check=True, env=environment)
        stamp.touch()
    return venv / "bin" / "python"


def run(python: Path, pytest: list[str]) -> Outcome:
    """Run pytest with a Python and count what came of it."""
    outcome = Outcome(_output([str(python), "-W", "ignore", "-c", DESCRIBE]).strip())
    print(f"\n{outcome.name}", flush=True)
    results, start = python.parents[1] / "tests.xml", time.monotonic()
    results.unlink(missing_ok=True)
    command = [str(python), "-m", "pytest", f"--junitxml={results}", *pytest]
    outcome.code = subprocess.run(command, cwd=ROOT).returncode
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
