"""Finds the user's code that a configuration names, and its source files: the module and its local imports.

Files are found by parsing with `ast`, including imports inside functions; no code is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_g2rl.config.tree import Config
from megatron_g2rl.registry import is_import_path


def named_code(config: Config) -> Iterator[tuple[str, str]]:
    """Keys and import paths (`package.module:name`) of all code that `config` names, reward functions first."""
    for part in config.reward.each_function():
        yield config.reward.key, part.function
    choices = {
        "exploration.method": config.exploration.method,
        "exploration.mapping": config.exploration.mapping,
        "algorithm.baseline": config.algorithm.baseline,
        "rollout.engine": config.rollout.engine,
        "model.family": config.model.family,
    }
    yield from ((key, value) for key, value in choices.items() if value is not None and is_import_path(value))


def imported_files(root: Path, module: str) -> list[Path]:
    """Files under `root` that importing `module` reads, including its own imports; [] if `module` is not there."""
    files: dict[Path, None] = {}
    pending = [module]
    while pending:
        for file in _files_of(root, pending.pop()):
            if file not in files:
                files[file] = None
                pending += _imports(file, root)
    return list(files)


def _files_of(root: Path, module: str) -> Iterator[Path]:
    """The file of a module and the `__init__.py` files of its parent packages."""
    folder = root
    for part in module.split("."):
        for file in (folder / f"{part}.py", folder / part / "__init__.py"):
            if file.is_file():
                yield file
        folder = folder / part


def _imports(file: Path, root: Path) -> Iterable[str]:
    """Modules imported by a file; [] when it cannot be parsed, which the run itself reports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return
    package = list(file.relative_to(root).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module or "").split(".")] if node.module else above
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)
