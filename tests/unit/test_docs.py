"""Links between the pages of the documentation resolve, and pages that the code refers to exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "launch").rglob("*.md")])
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]+))?\)")
PAGE = re.compile(r"\bdocs/[\w/-]+\.md\b")
SECTION = re.compile(r"docs/method\.md, sections? (\d)(?:(?:-| and )(\d))?")


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub generates them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tracked(*suffixes: str) -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    files = [REPOSITORY / name for name in names.splitlines()]
    return [file for file in files if file.suffix in suffixes and file.is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_of_a_page_resolves(page):
    broken = []
    for name, anchor in LINK.findall(page.read_text()):
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{name}#{anchor}" if anchor else name)
    assert not broken


def test_every_page_of_the_documentation_is_in_its_index():
    index = REPOSITORY / "docs/README.md"
    linked = {(index.parent / name).resolve() for name, _ in LINK.findall(index.read_text())}
    assert not [str(page) for page in PAGES if page.is_relative_to(index.parent) and page not in {*linked, index}]


def test_pages_that_the_code_refers_to_exist():
    sources = tracked(".py", ".yaml", ".sh", ".txt")
    missing = [
        f"{file.relative_to(REPOSITORY)}: {name}"
        for file in sources
        for name in PAGE.findall(file.read_text())
        if not (REPOSITORY / name).is_file()
    ]
    assert not missing
    sections = {
        int(number) for file in sources for found in SECTION.findall(file.read_text()) for number in found if number
    }
    headings = re.findall(r"^## (\d)\. ", (REPOSITORY / "docs/method.md").read_text(), re.MULTILINE)
    assert {1, 2, 3, 4, 5} <= sections <= set(map(int, headings))
