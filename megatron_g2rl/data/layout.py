"""Selects the files of a folder by file extension, split, and configuration (subset).

A folder in the layout of a Hub dataset (a README.md that lists configurations and their files) is resolved by
`datasets`; any other by words in the names of its files and subfolders.
"""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import yaml

from megatron_g2rl.config.inputs import PROMPT_FILES
from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.data.errors import DataError

SPLIT_WORDS = {
    "train": "train|training",
    "test": "test|testing|eval|evaluation",
    "validation": "validation|valid|dev|val",
}
"""Words in the name of a file (or its folder) that assign it to a split, as on the Hub."""


def files_of(folder: Path, config: DataConfig) -> list[Path]:
    """The files of `config.split` (and `config.subset`) in a folder and its subfolders, sorted by name.

    Raises:
        DataError: there are none, or the selection is ambiguous.
    """
    if names := _configurations(folder):
        return _listed_files(folder, names, config)
    if config.subset is not None:
        if not (folder / config.subset).is_dir():
            raise DataError(
                f"data.subset={config.subset}: folder {folder} has neither a subfolder of that name nor a README.md "
                "that lists configurations"
            )
        folder = folder / config.subset
    files = sorted(file for file in folder.rglob("*") if file.name.endswith(PROMPT_FILES) and file.is_file())
    if not files:
        raise DataError(f"data.source: folder {folder} holds no {', '.join(PROMPT_FILES)} file")
    return _of_split(folder, files, config.split)


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files of a split; without split words in any name, all files are `train`."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        name = str(file.relative_to(folder)).lower()
        named = [s for s, words in SPLIT_WORDS.items() if re.search(rf"(?<![a-z])({words})(?![a-z])", name)]
        by_split.setdefault(named[0] if named else "", []).append(file)
    unnamed = by_split.pop("", [])
    if not by_split:
        by_split["train"] = unnamed
    elif unnamed:
        raise DataError(
            f"data.source: folder {folder} has files named after a split ({', '.join(sorted(by_split))}) and others, "
            f"such as {unnamed[0].name}: put train, test or validation into each name, or name one file as data.source"
        )
    if split not in by_split:
        raise DataError(f"data.split: folder {folder} has no files for {split!r}; it has {', '.join(sorted(by_split))}")
    return by_split[split]


def _configurations(folder: Path) -> list[str]:
    """Names under `configs` in the YAML header of README.md, as on the Hub; [] without such a list."""
    readme = folder / "README.md"
    if not readme.is_file():
        return []
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        listed = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        raise DataError(f"{readme}: its header is not valid YAML ({error}); fix or remove it") from error
    configs = listed.get("configs") if isinstance(listed, dict) else None
    return [str(one.get("config_name", "default")) for one in configs or () if isinstance(one, dict)]


def _listed_files(folder: Path, names: list[str], config: DataConfig) -> list[Path]:
    if config.subset not in names and (config.subset is not None or len(names) > 1 and "default" not in names):
        raise DataError(f"data.subset={config.subset}: {folder}/README.md lists the configurations {', '.join(names)}")
    try:
        builder = datasets.load_dataset_builder(str(folder), config.subset)
    except (ValueError, OSError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"data.subset={config.subset}: {folder}/README.md: {error}") from error
    by_split = builder.config.data_files or {}
    if config.split not in by_split:
        raise DataError(
            f"data.split: {folder} has no split {config.split!r} in its configuration {builder.config.name}; it has "
            f"{', '.join(by_split)}"
        )
    return [Path(file) for file in by_split[config.split]]
