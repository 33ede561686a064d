"""Sources of several versions of packages, from which names and signatures are read without importing."""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

VERSIONS = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")


def kept_folder(config: pytest.Config, temporary: pytest.TempPathFactory) -> Path:
    """Cache of the sources between runs of the tests."""
    if config.pluginmanager.hasplugin("cacheprovider"):
        return Path(config.cache.mkdir("package_sources"))
    return temporary.mktemp("package_sources")


def fetch(version: str, folder: Path, package: str = "megatron-core") -> Path:
    """A folder with a package of `version`, from the package index or pip's cache; skips the test without it."""
    target = folder / f"{package}-{version}"
    if not target.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--ignore-requires-python", "--no-deps"]
        command += ["--no-compile", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
        command += ["--target", str(target), f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        if done.returncode:
            message = (done.stderr.strip().splitlines() or ["no output"])[-1]
            pytest.skip(f"needs a package index that has {package} {version}: {message}")
    return target


def path_with(first: Path) -> dict[str, str]:
    """Environment variables with which Python imports from `first` before anything else."""
    rest = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(first), *([rest] if rest else [])])}


@dataclass(frozen=True)
class Signature:
    """Parameters of a function or a constructor."""

    names: tuple[str, ...]
    """Positional and keyword parameters, `self` included."""
    keywords: frozenset[str]
    """Those that can be passed by keyword."""
    open: bool
    """It accepts any keyword."""


class Sources:
    """Definitions of one version."""

    def __init__(self, root: Path):
        self.root = root

    @functools.cache  # noqa: B019  an instance lives as long as the tests
    def tree(self, module: str) -> ast.Module | None:
        """A module's syntax tree; None: the module does not exist."""
        path = self.root.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text())
        return None

    def resolve(self, module: str, name: str, depth: int = 0) -> tuple[str, ast.AST] | None:
        """(module, definition) of a name, through re-exports; None: the module has no such name."""
        tree = self.tree(module)
        if tree is None or depth > 8:
            return None
        found = None
        for node in _statements(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                found = found or (module, node)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and name in _targets(node):
                found = found or (module, node)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        origin = self._origin(module, node)
                        inner = self.resolve(origin, alias.name, depth + 1)
                        found = found or inner or (module, node)
        if found is None and self.tree(f"{module}.{name}") is not None:
            return module, self.tree(f"{module}.{name}")
        return found

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = (self.root.joinpath(*module.split(".")) / "__init__.py").is_file()
        above = module.split(".")[: len(module.split(".")) - node.level + int(package)]
        return ".".join([*above, *filter(None, [node.module])])

    def signature(self, module: str, name: str) -> Signature | None:
        """Of a function or of a class; None: unknown from the sources."""
        found = self.resolve(module, name)
        if found is None:
            return None
        where, node = found
        if isinstance(node, ast.FunctionDef):
            return _signature(node.args)
        return self._of_class(where, node) if isinstance(node, ast.ClassDef) else None

    def method(self, module: str, name: str, method: str) -> Signature | None:
        """Of a method, its own or inherited from a base in these sources."""
        found = self.resolve(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        for node in found[1].body:
            if isinstance(node, ast.FunctionDef) and node.name == method:
                return _signature(node.args)
        bases = (self.method(found[0], base.id, method) for base in found[1].bases if isinstance(base, ast.Name))
        return next((signature for signature in bases if signature), None)

    def _of_class(self, module: str, node: ast.ClassDef) -> Signature | None:
        if own := self.method(module, node.name, "__init__"):
            return own
        names = {t for n in node.body if isinstance(n, ast.AnnAssign) for t in _targets(n)}
        for base in node.bases:
            if isinstance(base, ast.Name) and (inherited := self.signature(module, base.id)):
                names |= inherited.keywords
        return Signature(tuple(sorted(names)), frozenset(names), False) if names else None


def _statements(tree: ast.AST):
    """Statements of a module, including those under `if` and `try`."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from _statements(node)


def _targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {t.id for t in targets if isinstance(t, ast.Name)}


def _signature(arguments: ast.arguments) -> Signature:
    names = tuple(a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
    keywords = frozenset(a.arg for a in [*arguments.args, *arguments.kwonlyargs])
    return Signature(names, keywords, arguments.kwarg is not None)
