"""Where a conversion writes: a folder beside its destination, which takes its name when all is done."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_g2rl.errors import UserError
from megatron_g2rl.policy.hf.megatron_folder import MEGATRON

_MODEL_SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt", ".md")
_OF_A_RUN = ("trainer.json", "status.json", "best.json")


class ConversionError(UserError):
    """The destination of a conversion is there already, or cannot be written."""


@contextmanager
def destination(source: Path, target: str | Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to write to; it becomes `target` at the end, and is removed after an error.

    Args:
        source: what is converted.
        target: the destination.
        overwrite: replace a `target` that is a model's folder and nothing else; it is as it was until the end.

    Raises:
        ConversionError: `target` is a file, has something in it, holds or lies in the source; or the disk is full.
    """
    target = _without_dots(Path(target))
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConversionError(f"{target} and the source {source} hold one another: choose another destination")
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
        raise _told(error, source, target) from error
    except RuntimeError as error:
        if "write" not in str(error):  # torch says of a full disk that a write failed
            raise
        raise ConversionError(
            f"{target} cannot be written ({error}): free disk space there, or choose another destination"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _without_dots(target: Path) -> Path:
    """The absolute path of a destination without `..`; a link stays one."""
    return target.resolve() if target.name in ("", "..") else target.parent.resolve() / target.name


def _told(error: OSError, source: Path, target: Path) -> ConversionError:
    reason, file = error.strerror or error, error.filename
    if isinstance(file, str | Path) and Path(file).is_relative_to(source):
        return ConversionError(f"{file} cannot be read ({reason})")
    room = "free disk space there, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return ConversionError(f"{target} cannot be written ({reason}): {room}choose another destination")


def _check_replaceable(target: Path, overwrite: bool) -> None:
    """Refuse to replace a folder without `overwrite`, and one with anything in it that is no part of a model always."""
    names = {path.name for path in target.iterdir()}
    other = sorted(path.name for path in target.iterdir() if not _is_of_a_model(path))
    if other or "config.json" not in names:
        found = f"holds {other[0]}" if other else "has no config.json"
        raise ConversionError(
            f"{target} is not empty and {found}: it is not only a converted model, and is never replaced; choose "
            "another destination, or clear it yourself"
        )
    if not overwrite:
        raise ConversionError(f"{target} holds a model: choose another destination, or --overwrite to replace it")


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
    """Let a model's config.json say the dtype of its tensors: it is what they are loaded as."""
    settings = json.loads(config.read_text())
    name = str(dtype).removeprefix("torch.")
    keys = [key for key in ("dtype", "torch_dtype") if key in settings] or ["torch_dtype"]
    if any(settings.get(key) != name for key in keys):
        config.write_text(json.dumps(settings | dict.fromkeys(keys, name), indent=2) + "\n")
