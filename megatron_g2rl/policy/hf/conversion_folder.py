"""Output folder of a conversion: a temporary folder next to the destination, renamed when the conversion is done."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_g2rl.config.run_files import MEGATRON, TRAINER_STATE
from megatron_g2rl.errors import UserError

_MODEL_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".md")
_OF_A_RUN = (TRAINER_STATE, "status.json", "best.json")


class ConversionError(UserError):
    """The destination of a conversion already exists, or cannot be written."""


@contextmanager
def destination(source: Path, target: str | Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to write to; it is renamed to `target` at the end, and removed after an error.

    Args:
        source: folder that is converted.
        target: the destination.
        overwrite: replace `target` if it contains only a model; it is unchanged until the end.

    Raises:
        ConversionError: `target` is a file, is not empty, contains or is inside the source; or the disk is full.
    """
    target = _without_dots(Path(target))
    source_path, target_path = source.resolve(), target.resolve()
    if source_path == target_path or source_path in target_path.parents or target_path in source_path.parents:
        raise ConversionError(
            f"{target} and the source {source} are the same folder or contain one another: choose another destination"
        )
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file: choose another destination")
    if target.is_dir() and any(target.iterdir()):
        _check_replaceable(target, overwrite)
    partial = target.parent / f".partial_{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _replace(partial, target)
    except OSError as error:
        raise _as_conversion_error(error, source, target) from error
    except RuntimeError as error:
        if "write" not in str(error):  # torch reports a full disk as a failed write
            raise
        raise ConversionError(
            f"{target} cannot be written ({error}): free disk space there, or choose another destination"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _without_dots(target: Path) -> Path:
    """The absolute path of a destination without `..`; a symbolic link is kept."""
    return target.resolve() if target.name in ("", "..") else target.parent.resolve() / target.name


def _as_conversion_error(error: OSError, source: Path, target: Path) -> ConversionError:
    reason, file = error.strerror or error, error.filename
    if isinstance(file, str | Path) and Path(file).is_relative_to(source):
        return ConversionError(f"{file} cannot be read ({reason})")
    free_space = "free disk space there, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return ConversionError(f"{target} cannot be written ({reason}): {free_space}choose another destination")


def _check_replaceable(target: Path, overwrite: bool) -> None:
    """Refuse to replace a folder that contains other files than a model, or any folder without `overwrite`."""
    names = {path.name for path in target.iterdir()}
    other = sorted(path.name for path in target.iterdir() if not _is_of_a_model(path))
    if other or "config.json" not in names:
        reason = f"contains {other[0]}" if other else "has no config.json"
        raise ConversionError(
            f"{target} is not empty and {reason}: it is more than a converted model, and is never replaced; choose "
            "another destination, or empty it yourself"
        )
    if not overwrite:
        raise ConversionError(f"{target} contains a model: choose another destination, or replace it with --overwrite")


def _is_of_a_model(path: Path) -> bool:
    if path.is_dir():
        return path.name == MEGATRON
    return path.suffix in _MODEL_SUFFIXES and path.name not in _OF_A_RUN


def _replace(partial: Path, target: Path) -> None:
    old = target.parent / f".replaced_{target.name}"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def set_dtype(config: Path, dtype: torch.dtype) -> None:
    """Set the dtype in a model's config.json to that of its tensors; transformers loads them in it."""
    settings = json.loads(config.read_text())
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in settings] or ["torch_dtype"]
    if any(settings.get(key) != name for key in keys):
        config.write_text(json.dumps(settings | dict.fromkeys(keys, name), indent=2) + "\n")
