"""docs/architecture.md names files that exist, and its layers are those of the imports."""

from __future__ import annotations

import re
from pathlib import Path

from import_graph import PACKAGE, REPOSITORY, SOURCES, imports, module_name

PAGE = (REPOSITORY / "docs/architecture.md").read_text()
FIGURE = re.search(r"```mermaid\n(.*?)```", PAGE, re.DOTALL)[1]
FILE = re.compile(r"[\w/]+\.(?:py|md|yaml)\b")
LAYER = re.compile(r"^\| (?P<number>\d), [^|]* \| (?P<names>[^|]*) \|$", re.MULTILINE)


def rows_of(heading: str) -> list[str]:
    """The rows of the table under a heading, without its head."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")][2:]


def exists(name: str) -> bool:
    return any((folder / name).is_file() for folder in (REPOSITORY / PACKAGE, REPOSITORY, REPOSITORY / "docs"))


def layers() -> dict[str, int]:
    """Layer of each package and module of the package."""
    return {
        name.removesuffix("/").removesuffix(".py"): int(row["number"])
        for row in LAYER.finditer(PAGE)
        for name in re.findall(r"`([\w/.]+)`", row["names"])
    }


def test_every_file_that_the_page_names_exists():
    names = set(FILE.findall(PAGE))
    assert len(names) > 50 and not [name for name in names if not exists(name)]


def test_every_box_of_the_figure_names_its_files():
    boxes = re.findall(r'^\s*\w+\["(<b>.*)"\]$', FIGURE, re.MULTILINE)
    assert len(boxes) == 14 and all(FILE.search(box) for box in boxes)


def test_every_row_says_where_to_change_something():
    rows = rows_of("Where do I change X")
    assert len(rows) >= 15 and all(FILE.search(row.split("|")[2]) for row in rows)


def test_every_part_of_the_package_is_in_one_layer():
    tops = {path.relative_to(REPOSITORY / PACKAGE).parts[0] for path in SOURCES} - {"__init__.py"}
    assert set(layers()) == {Path(name).stem for name in tops}
    named = [name for row in LAYER.finditer(PAGE) for name in re.findall(r"`([\w/.]+)`", row["names"])]
    assert len(named) == len(tops) and sorted(set(layers().values())) == [1, 2, 3]


def test_no_layer_imports_one_above_it():
    number, arrows = layers(), 0
    for file in SOURCES:
        own = module_name(file).split(".")[1:2]
        for name in imports(file):
            parts = name.split(".")
            if own and parts[0] == PACKAGE and parts[1:2] and parts[1] in number:
                arrows += 1
                assert number[own[0]] >= number[parts[1]], f"{file.relative_to(REPOSITORY)} imports {name}"
    assert arrows > 200
