"""The names that this package uses of megatron-core exist in every supported version."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from package_sources import VERSIONS, Sources, fetch, kept_folder

from megatron_g2rl.policy.megatron_compat import PRIVATE, SUPPORTED

pytestmark = pytest.mark.slow

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_g2rl"
COMPAT = PACKAGE / "policy" / "megatron_compat.py"
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if "megatron.core" in file.read_text()]


@pytest.fixture(scope="session")
def sources(tmp_path_factory, pytestconfig):
    folder = kept_folder(pytestconfig, tmp_path_factory)
    return lambda version: Sources(fetch(version, folder))


def imported(file: Path) -> dict[str, tuple[str, str]]:
    """Local name -> (module, name) of everything that a file imports from megatron, at any level."""
    found = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "megatron":
            found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "megatron":
                    parent, _, name = alias.name.rpartition(".")
                    found[alias.asname or alias.name] = (parent, name)
    return found


def keywords_of_calls(file: Path) -> list[tuple[str, str, set[str]]]:
    """(module, name, keywords) of the calls of imported names."""
    names, calls = imported(file), []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            calls.append((*names[node.func.id], {k.arg for k in node.keywords if k.arg}))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            base = node.func.value
            if isinstance(base, ast.Name) and base.id in names:
                module, name = names[base.id]
                calls.append((f"{module}.{name}", node.func.attr, {k.arg for k in node.keywords if k.arg}))
    return calls


def overridden(file: Path) -> list[tuple[str, str, str, tuple[str, ...]]]:
    """(module, base, method, parameters) of the methods of subclasses of Megatron's classes."""
    names, methods = imported(file), []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            bases = [names[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in names]
            for method in (part for part in node.body if isinstance(part, ast.FunctionDef)):
                methods += [(*base, method.name, tuple(a.arg for a in method.args.args)) for base in bases]
    return methods


def test_the_supported_versions_are_among_those_compared():
    assert set(SUPPORTED) <= set(VERSIONS) and FILES


@pytest.mark.parametrize("version", VERSIONS)
def test_every_imported_name_exists(version, sources):
    known = sources(version)
    names = {name for file in FILES for name in imported(file).values()}
    assert len(names) > 15
    assert not [name for name in names if known.resolve(*name) is None]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_passed_keyword_is_accepted(version, sources):
    known, unknown, checked = sources(version), [], 0
    for module, name, keywords in (call for file in FILES for call in keywords_of_calls(file)):
        if signature := known.signature(module, name):
            checked += len(keywords)
            if not signature.open:
                unknown += [f"{name}({keyword}=)" for keyword in keywords - signature.keywords]
    assert checked > 60
    assert not unknown


@pytest.mark.parametrize("version", VERSIONS)
def test_overridden_methods_have_the_parameters_of_the_base(version, sources):
    known, wrong, compared = sources(version), [], 0
    for file in FILES:
        for module, base, method, parameters in overridden(file):
            signature = known.method(module, base, method)
            if signature and method != "__init__":
                compared += 1
                if parameters[: len(signature.names)] != signature.names:
                    wrong.append(f"{base}.{method} takes {signature.names}, ours {parameters}")
    assert compared
    assert not wrong


@pytest.mark.parametrize("version", VERSIONS)
def test_private_names_have_the_expected_parameters(version, sources):
    known, wrong = sources(version), []
    for file, names in PRIVATE.items():
        module = file.removesuffix(".py").replace("/", ".")
        for name, parameters in names.items():
            owner, _, method = name.rpartition(".")
            signature = known.method(module, owner, method) if owner else known.signature(module, method)
            if signature is None or signature.names != parameters:
                wrong.append(f"{name}: {signature and signature.names}, expected {parameters}")
    assert not wrong


def test_private_names_are_used_in_one_module_only():
    """Imports of names with an underscore, assignments to megatron's modules, and the listed private attributes."""
    private = {name.rpartition(".")[2] for names in PRIVATE.values() for name in names}
    found = []
    for file in (file for file in sorted(PACKAGE.rglob("*.py")) if file != COMPAT):
        names = imported(file)
        found += [f"{file.name} imports {name}" for _, name in names.values() if name.startswith("_")]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in private and node.attr.startswith("_"):
                found.append(f"{file.name} uses {node.attr}")
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                        if names.get(target.value.id, ("", ""))[0].startswith("megatron"):
                            found.append(f"{file.name} replaces {target.value.id}.{target.attr}")
    assert not found


def test_the_comparison_detects_removed_names(sources):
    """The signatures that broke saving between 0.16.1 and 0.17.1."""
    module, name = "megatron.core.dist_checkpointing.strategies.torch", "TorchDistSaveShardedStrategy"
    hook = "_get_save_and_finalize_callbacks"
    old, new = (sources(version).method(module, name, hook) for version in ("0.16.1", "0.17.1"))
    assert old.names == ("self", "writer", "save_state_dict_ret") and new.names != old.names
    assert sources("0.19.2").resolve("megatron.core.optimizer", "no_such_name") is None
