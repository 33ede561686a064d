"""The files of code that a configuration names: those of a module and of all that it imports from the same folder.

Read from the source by `ast`, imports inside functions included; nothing is run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path


def imported_files(root: Path, module: str) -> list[Path]:
    """Files below `root` that importing `module` reads, those that it imports included; [] if it is from elsewhere."""
    found: dict[Path, None] = {}
    waiting = [module]
    while waiting:
        for file in _files_of(root, waiting.pop()):
            if file not in found:
                found[file] = None
                waiting += _imports(file, root)
    return list(found)


def _files_of(root: Path, module: str) -> Iterator[Path]:
    """The file of a module and those of the packages that it is in."""
    folder = root
    for part in module.split("."):
        for file in (folder / f"{part}.py", folder / part / "__init__.py"):
            if file.is_file():
                yield file
        folder = folder / part


def _imports(file: Path, root: Path) -> Iterable[str]:
    """Modules that a file names in its imports; [] when it cannot be parsed: the run says so itself."""
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
