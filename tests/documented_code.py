"""The complete files that a page of the documentation shows: code blocks that begin with `# name.py`."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```python\n# (?P<name>\w+\.py)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def documented_files(page: str) -> dict[str, str]:
    """Name and text of each file on a page."""
    return {block["name"]: block["text"] for block in _BLOCK.finditer((REPOSITORY / page).read_text())}


def write_documented_files(page: str, folder: Path) -> Path:
    """Write the files of a page to a folder; returns it."""
    for name, text in documented_files(page).items():
        (folder / name).write_text(text)
    return folder
