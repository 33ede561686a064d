"""The files beside a model's weights: configuration, tokenizer, chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_OURS = ("manifest.json", "trainer.json")


def side_files(source: Path) -> list[Path]:
    """What AutoConfig and AutoTokenizer read of a Hugging Face or Megatron folder; no weights and no index of them."""
    return sorted(
        path
        for path in source.iterdir()
        if path.is_file() and path.suffix in _SUFFIXES and "safetensors" not in path.name and path.name not in _OURS
    )


def copy_model_files(source: Path, folder: Path) -> list[str]:
    """Copy the `side_files` of `source` into `folder`; returns their names."""
    files = side_files(source)
    for path in files:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in files]
