"""The wheel works without the repository: examples, documentation and lock files are in it, and `g2rl` finds them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("megatron_g2rl", "examples", "docs", "launch")
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt", "constraints-gpu.txt")

pytestmark = [pytest.mark.slow, pytest.mark.same_for_both]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder of an unpacked wheel of a copy of the sources, as after an installation."""
    copy, folder = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(REPOSITORY / name, copy / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        copy / "dist",
        copy,
    ]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = (copy / "dist").iterdir()
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def g2rl(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "megatron_g2rl.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


def test_the_wheel_holds_every_example_page_and_lock_file(installed):
    shipped = installed / "megatron_g2rl/shipped"
    for suffix, folder in ((".yaml", "examples"), (".py", "examples"), (".md", "docs"), (".svg", "docs")):
        wanted = {file.relative_to(REPOSITORY) for file in (REPOSITORY / folder).rglob(f"*{suffix}")}
        assert wanted == {file.relative_to(shipped) for file in (shipped / folder).rglob(f"*{suffix}")}
    assert {file.name for file in shipped.glob("*.txt")} == {"constraints.txt", "constraints-gpu.txt"}
    assert (installed / "megatron_g2rl/py.typed").is_file()
    assert next(installed.glob("*.dist-info/licenses/LICENSE")).read_text() == (REPOSITORY / "LICENSE").read_text()


def test_the_wheel_holds_every_file_of_the_packages(installed):
    for package, folder in (("megatron_g2rl", "."), ("g2rl_launch", "launch")):
        source = REPOSITORY / folder
        files = [file for file in (source / package).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        assert not [file for file in files if not (installed / file.relative_to(source)).is_file()]


def test_examples_are_copied_once_and_are_usable(installed, tmp_path):
    done = g2rl(installed, tmp_path, "examples")
    assert done.returncode == 0, done.stderr
    *written, documentation = done.stdout.splitlines()
    assert {Path(line) for line in written} == {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    assert Path(documentation.removeprefix("documentation: ")).is_relative_to(installed)
    assert Path(documentation.removeprefix("documentation: ")).is_file()
    dry = g2rl(installed, tmp_path, "train", "examples/quickstart/g2rl.yaml", "--dry-run", "model.path=org/model")
    assert dry.returncode == 0, dry.stderr

    changed = tmp_path / "examples/quickstart/g2rl.yaml"
    changed.write_text("mine")
    (tmp_path / "examples/quickstart/grpo.yaml").unlink()
    again = g2rl(installed, tmp_path, "examples")
    assert again.returncode == 1 and "nothing was written" in again.stderr and "g2rl examples DIR" in again.stderr
    assert changed.read_text() == "mine" and not (tmp_path / "examples/quickstart/grpo.yaml").exists()


def test_messages_refer_to_files_that_an_installation_has(installed, tmp_path):
    code = "from megatron_g2rl.config import install_hints as h; print(h.VLLM)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    paths = [Path(word.strip(";")) for word in done.stdout.split() if word.strip(";").endswith((".txt", ".md"))]
    assert len(paths) == 2 and all(path.is_file() and path.is_relative_to(installed) for path in paths)
