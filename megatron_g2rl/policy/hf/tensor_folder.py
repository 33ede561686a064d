"""Folders of safetensors files: reads single tensors, and writes a folder with one tensor in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_g2rl.errors import UserError

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Size of a file of a Hugging Face checkpoint; the default of transformers."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class WeightsError(UserError):
    """A checkpoint's tensors cannot be read, or do not match the model."""


@dataclass(frozen=True)
class Header:
    """Shape and dtype of a tensor, known without reading its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _indexed(index: Path) -> dict[str, str]:
    """Tensor -> file, from a folder's index; all files must be in the folder itself.

    Raises:
        WeightsError: it is not an index, or names a file elsewhere.
    """
    try:
        files = json.loads(_read_regular(index))["weight_map"]
        if not isinstance(files, dict) or not files:
            raise TypeError("weight_map is not a mapping of tensors to files")
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise WeightsError(f"{index}: not a valid index of weights ({error}); download or copy it again") from error
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors") or "\0" in file:
            raise WeightsError(
                f"{index}: it maps tensor {name!r} to {str(file)[:200]!r}, which is not a .safetensors file of this "
                "folder; files outside the folder are not read"
            )
    return files


def _read_regular(path: Path) -> str:
    """The text of a regular file: opening a pipe would block."""
    if not path.is_file():
        raise OSError("it is not a regular file")
    return path.read_text(encoding="utf-8")


def _opened(file: Path):
    """`safe_open` with errors that name the file."""
    if not file.is_file():
        why = "it is not a regular file" if file.exists() else "there is no such file"
        raise WeightsError(f"{file}: {why}; download or copy the model again")
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise _corrupt(file, error) from error


def _corrupt(file: Path, error: Exception) -> WeightsError:
    return WeightsError(f"{file}: it is incomplete or corrupt ({error}); download or copy the model again")


class TensorFolder:
    """Reads single tensors from a Hugging Face folder of safetensors files, with or without an index."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self.folder / INDEX
        self.files = _indexed(index) if index.exists() else self._scan()

    def _scan(self) -> dict[str, str]:
        """Tensor -> file, for a folder without an index."""
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise WeightsError(f"{self.folder}: no .safetensors file; save the model with save_pretrained first")
        files: dict[str, str] = {}
        for path in paths:
            with _opened(path) as opened:
                for name in opened.keys():
                    if name in files:
                        raise WeightsError(
                            f"{self.folder}: tensor {name!r} is in {files[name]} and in {path.name}; remove the file "
                            f"that does not belong to the model, or add its {INDEX}"
                        )
                    files[name] = path.name
        return files

    def headers(self) -> dict[str, Header]:
        """Shape and dtype of every tensor, from the files' headers; every file is opened once.

        Raises:
            WeightsError: a file is missing, incomplete or corrupt, lacks a tensor that the index maps to it, or has a
                dtype that is not supported (quantized weights).
        """
        named: dict[str, list[str]] = {}
        for name, file in self.files.items():
            named.setdefault(file, []).append(name)
        headers = {}
        for file, names in named.items():
            with _opened(self.folder / file) as opened:
                held = set(opened.keys())
                extra = sorted(n for n in held - set(names) if not n.endswith(".rotary_emb.inv_freq"))
                if extra:
                    where = f" but to {self.files[extra[0]]}" if extra[0] in self.files else ""
                    raise WeightsError(
                        f"{self.folder / file}: it contains tensor {extra[0]!r}, which the index does not map to this "
                        f"file{where}: download or copy the model again"
                    )
                for name in names:
                    if name not in held:
                        raise WeightsError(
                            f"{self.folder / file}: tensor {name!r} is missing, but the index maps it to this file"
                        )
                    part = opened.get_slice(name)
                    if part.get_dtype() not in _DTYPES:
                        raise WeightsError(
                            f"{self.folder / file}: tensor {name!r} is stored as {part.get_dtype()}, not one of "
                            f"{', '.join(_DTYPES)}: use a checkpoint that is not quantized"
                        )
                    headers[name] = Header(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
        return headers

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU; memory-mapped, so pages are read on access.

        Raises:
            WeightsError: there is no such tensor, or its file cannot be read.
        """
        if name not in self.files:
            raise WeightsError(f"{self.folder}: tensor {name!r} is missing")
        file = self.folder / self.files[name]
        with _opened(file) as opened:
            try:
                return opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise _corrupt(file, error) from error


def write_tensors(
    folder: Path, headers: dict[str, Header], tensors: Iterable[tuple[str, Tensor]], shard_bytes: int
) -> None:
    """Write `model*.safetensors` files, and an index if there are several, with one tensor in memory at a time.

    Args:
        folder: existing folder.
        headers: headers of all tensors, in the order of `tensors`.
        tensors: (name, tensor), each freed before the next is requested.
        shard_bytes: largest size of a file's tensors, except for a single larger tensor.

    Raises:
        WeightsError: a tensor differs from its header.
        OSError: a file cannot be written.
    """
    files = _plan(headers, shard_bytes)
    stream = iter(tensors)
    for file, names in files.items():
        _write_file(folder / file, {name: headers[name] for name in names}, stream)
    if (surplus := next(stream, None)) is not None:
        raise WeightsError(f"{folder}: tensor {surplus[0]!r} is not among the expected headers")
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(header.bytes for header in headers.values())},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def _plan(headers: dict[str, Header], shard_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors in it, with Hugging Face's file names."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, header in headers.items():
        if parts[-1] and size + header.bytes > shard_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += header.bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _write_file(path: Path, headers: dict[str, Header], stream: Iterator[tuple[str, Tensor]]) -> None:
    """Write one file: header length (8 bytes), header (JSON), tensors. safetensors' own writer needs all in memory."""
    # Readers need every tensor aligned to its dtype: the widest come first.
    offsets, end = {}, 0
    for name in sorted(headers, key=lambda name: -headers[name].dtype.itemsize):
        offsets[name] = (end, end := end + headers[name].bytes)
    described = {
        name: {"dtype": _NAMES[h.dtype], "shape": list(h.shape), "data_offsets": list(offsets[name])}
        for name, h in headers.items()
    }
    text = json.dumps({"__metadata__": {"format": "pt"}} | described).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in headers:
            given, tensor = next(stream, (None, None))
            if given != name or Header(tuple(tensor.shape), tensor.dtype) != headers[name]:
                raise WeightsError(f"{path}: expected tensor {name!r} as {headers[name]}, but received {given!r}")
            file.seek(8 + len(text) + offsets[name][0])
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            del tensor
        file.flush()
        os.fsync(file.fileno())
