"""A model folder's config and tokenizer files, chat template included."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_g2rl.config.run_files import MANIFEST, TRAINER_STATE, WARM_START_RECORD

_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_OURS = (MANIFEST, TRAINER_STATE, WARM_START_RECORD)


def model_files(source: Path) -> list[Path]:
    """The files that AutoConfig and AutoTokenizer read from a Hugging Face or Megatron folder; no weights or index."""
    return sorted(
        path
        for path in source.iterdir()
        if path.is_file() and path.suffix in _SUFFIXES and "safetensors" not in path.name and path.name not in _OURS
    )


def copy_model_files(source: Path, folder: Path) -> list[str]:
    """Copy the config and tokenizer files (`model_files`) of `source` into `folder`; return their names."""
    files = model_files(source)
    for path in files:
        shutil.copyfile(path, folder / path.name)
    return [path.name for path in files]
