"""The names that this package uses of vLLM exist in the installed version, and are used in one module."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from megatron_g2rl.rollout import vllm_compat
from megatron_g2rl.rollout.engine import RolloutError

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_g2rl"
COMPAT = PACKAGE / "rollout" / "vllm_compat.py"
PUBLIC = ("vllm", "vllm.platforms")


@pytest.fixture(scope="module")
def sources() -> Path:
    """The folder of the installed vLLM, which is not imported."""
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        pytest.skip("vLLM is not installed: docs/install.md")
    return Path(spec.origin).parent


def imports(file: Path) -> list[tuple[str, str]]:
    """(module, name) of everything that a file imports from vllm."""
    nodes = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom))
    return [(n.module, alias.name) for n in nodes if (n.module or "").split(".")[0] == "vllm" for alias in n.names]


def missing(sources: Path, private: dict[str, tuple[str, ...]]) -> list[str]:
    files = {name: sources / name for name in private}
    texts = {name: file.read_text() if file.is_file() else "" for name, file in files.items()}
    return [f"{name}: {text}" for name, wanted in private.items() for text in wanted if text not in texts[name]]


def test_private_names_exist_in_the_installed_version(sources):
    assert missing(sources, vllm_compat.PRIVATE) == []
    assert missing(sources, {"v1/engine/core.py": ("self.no_such_name",), "gone.py": ("x",)}) != []


def test_imported_names_exist_in_the_installed_version(sources):
    names = {name for file in PACKAGE.rglob("*.py") for name in imports(file)}
    assert len(names) >= 4
    for module, name in names:
        path = sources.joinpath(*module.split(".")[1:])
        text = path.with_suffix(".py").read_text() if path.with_suffix(".py").is_file() else ""
        text += (path / "__init__.py").read_text() if path.is_dir() else ""
        assert name in text or (path / f"{name}.py").is_file() or (path / name).is_dir(), f"{module}.{name}"


def test_private_names_are_used_in_one_module():
    private = ("_finalizer", "_WORLD", "engine_core", "batch_queue")
    found = []
    for file in (file for file in PACKAGE.rglob("*.py") if file != COMPAT):
        found += [f"{file.name} imports {module}" for module, _ in imports(file) if module not in PUBLIC]
        nodes = ast.walk(ast.parse(file.read_text()))
        found += [f"{file.name}: {n.attr}" for n in nodes if isinstance(n, ast.Attribute) and n.attr in private]
    assert not found


@pytest.mark.parametrize(
    "version, refused", [("0.32.0", False), ("0.32.0+cpu", False), ("0.33.0", True), ("1.0", True)]
)
def test_an_untested_version_is_refused(version, refused, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if not refused:
        return vllm_compat.check_version()
    with pytest.raises(RolloutError, match=rf"vllm {version} is not supported.*0\.32\.0.*rollout\.engine"):
        vllm_compat.check_version()


def test_an_absent_vllm_is_refused_with_the_installation_command(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(RolloutError, match=r"not installed.*constraints\.txt.*docs/install\.md.*rollout\.engine"):
        vllm_compat.check_version()
