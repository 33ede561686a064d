"""Checks that no pickle in a Megatron folder can run code, before megatron-core reads the folder.

The torch_dist format has pickles in three places: `.metadata` (read with pickle.load), `common.pt` (torch.load), and
byte entries inside the `.distcp` files (torch.load with weights_only=False). A pickle runs code by naming a global, a
function of some module, and calling it. The check reads every pickle once with each global replaced by an inert class:
nothing that it names is imported or called. Names outside the short list of those that megatron-core writes are
refused. Tensors inside the `.distcp` files need no check: torch reads them with weights_only=True.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_g2rl.errors import UserError


class UnsafePickle(UserError):
    """A pickle names a global that could run code."""


class CorruptPickle(UnsafePickle):
    """A file or entry that should be a pickle is not a complete one."""


ZIP = b"PK\x03\x04"
"""First bytes of a zip archive, and therefore of every file that torch.save writes."""
_DCP = "torch.distributed.checkpoint"
_METADATA = {
    f"{_DCP}.metadata": (
        "Metadata TensorStorageMetadata BytesStorageMetadata TensorProperties ChunkStorageMetadata MetadataIndex "
        "StorageMeta _MEM_FORMAT_ENCODING"
    ),
    f"{_DCP}.filesystem": "_StorageInfo _StoragePrefix",
    f"{_DCP}.planner": "SavePlan WriteItem WriteItemType TensorWriteData",
    "torch": "Size",
    "torch.serialization": "_get_layout",
}
_DATA = {
    "torch._utils": "_rebuild_tensor_v2",
    "torch": (
        "Size DoubleStorage FloatStorage HalfStorage BFloat16Storage LongStorage IntStorage ShortStorage CharStorage "
        "ByteStorage BoolStorage"
    ),
    "torch.storage": "UntypedStorage",
    "collections": "OrderedDict",
    "_io": "BytesIO",
    "_codecs": "encode",  # used by protocol 2 for bytes
}
_DTYPES = {("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def _pairs(names: dict[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(_DTYPES | {(module, name) for module, listed in names.items() for name in listed.split()})


METADATA_GLOBALS = _pairs(_METADATA)
"""(module, name) pairs allowed in `.metadata`."""
DATA_GLOBALS = _pairs(_DATA)
"""(module, name) pairs allowed in `common.pt` and byte entries."""


class _Sealed(type):
    def __setattr__(cls, name, value):
        raise pickle.UnpicklingError("it modifies a class")


class _Inert(metaclass=_Sealed):
    """Placeholder for every object that a pickle builds: accepts everything and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


class _Checker(pickle.Unpickler):
    """Reads a pickle without importing or calling anything it names."""

    def __init__(self, stream: BinaryIO, allowed: frozenset[tuple[str, str]], what: str):
        super().__init__(stream)
        self.allowed, self.what = allowed, what

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise UnsafePickle(
                f"{self.what} names {module}.{name}, which megatron-core never writes and which could run code when "
                "it is read; nothing was executed. Do not use this folder, and check where it comes from"
            )
        return _Inert

    def persistent_load(self, key: Any) -> Any:
        return _Inert()


class _Metadata(pickle.Unpickler):
    """Loads `.metadata` using only the classes that belong there."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in METADATA_GLOBALS:
            raise UnsafePickle(f".metadata names {module}.{name}")
        return super().find_class(module, name)


def check_pickle(stream: BinaryIO, what: str, allowed: frozenset[tuple[str, str]] = DATA_GLOBALS) -> None:
    """Refuse a pickle that names a global outside `allowed`, without executing it.

    Args:
        stream: positioned at the start of the pickle.
        what: the file and entry, for the message.
        allowed: (module, name) pairs.

    Raises:
        UnsafePickle: names the global.
        CorruptPickle: there is no complete pickle.
    """
    try:
        _Checker(stream, allowed, what).load()
    except UnsafePickle:
        raise
    except Exception as error:  # a corrupt pickle can raise anything
        raise CorruptPickle(f"{what}: there is no complete pickle ({type(error).__name__}: {error})") from error


def load_saved(path: Path) -> Any:
    """Load a file written by torch.save that contains only numbers, text, containers and tensors.

    The file is read once, so the bytes that are checked are the bytes that are loaded.

    Raises:
        UnsafePickle: a pickle in it could run code.
        CorruptPickle: torch.save did not write it, or it is incomplete.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    check_saved(data, str(path))
    # With this variable torch ignores weights_only=True and reads pickles of any kind.
    forced = os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CorruptPickle(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    finally:
        if forced is not None:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = forced


def check_saved(data: Path | bytes, what: str) -> None:
    """`check_pickle` for a file that torch.save wrote, or for its bytes."""
    content = data.read_bytes() if isinstance(data, Path) else data
    if not content.startswith(ZIP):
        # A reader might accept an archive at the end of the file, or one of the older formats at the start.
        raise CorruptPickle(f"{what}: it was not written by torch.save: it does not start like a zip archive")
    try:
        archive = torch._C.PyTorchFileReader(io.BytesIO(content))
        records = archive.get_all_records()
        content = archive.get_record("data.pkl")
    except Exception as error:
        raise CorruptPickle(f"{what}: it was not written by torch.save ({error})") from error
    if "constants.pkl" in records:
        raise UnsafePickle(f"{what} is a TorchScript program: it could run code when it is read; nothing was executed")
    check_pickle(io.BytesIO(content), what)


def read_metadata(megatron_folder: Path) -> Metadata:
    """The index of a torch_dist folder: which file has which tensor; anything else in it is refused.

    Raises:
        UnsafePickle: it names a global that does not belong there.
        CorruptPickle: it is truncated or changed.
        OSError: it cannot be read.
    """
    path = megatron_folder / ".metadata"
    content = path.read_bytes()
    check_pickle(io.BytesIO(content), str(path), METADATA_GLOBALS)
    try:
        metadata = _Metadata(io.BytesIO(content)).load()
        check_index(metadata)
    except Exception as error:
        raise CorruptPickle(f"{path} cannot be read ({type(error).__name__}: {error})") from error
    return metadata


def check_index(metadata: Any) -> None:
    """Refuse an index with values outside the types and ranges that torch writes.

    Raises:
        ValueError: names the part.
    """
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it contains a {type(metadata).__name__}")
    tensors, locations = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(tensors, dict) or not isinstance(locations, dict):
        raise ValueError("it has no list of tensors, or no list of their locations")
    for key, stored in tensors.items():
        if type(key) is not str or not isinstance(stored, BytesStorageMetadata | TensorStorageMetadata):
            raise ValueError(f"{key!r:.80} is not a tensor")
        if isinstance(stored, TensorStorageMetadata) and not _is_tensor(stored):
            raise ValueError(f"{key!r:.80} has an invalid size, dtype or list of blocks")
    for index, location in locations.items():
        numbers = (location.offset, location.length) if isinstance(location, _StorageInfo) else ()
        if not isinstance(index, MetadataIndex) or not numbers or not all(_is_size(number) for number in numbers):
            raise ValueError(f"the location of {index!r:.80} is invalid")
        if type(location.relative_path) is not str:
            raise ValueError(f"the file of {index!r:.80} is {location.relative_path!r:.80}")


def _is_tensor(stored: TensorStorageMetadata) -> bool:
    if not isinstance(stored.properties, TensorProperties) or not isinstance(stored.properties.dtype, torch.dtype):
        return False
    chunks = stored.chunks
    if not isinstance(chunks, list) or not all(isinstance(chunk, ChunkStorageMetadata) for chunk in chunks):
        return False
    shapes = [stored.size, *(shape for chunk in chunks for shape in (chunk.offsets, chunk.sizes))]
    return all(
        isinstance(shape, tuple | list) and len(shape) == len(stored.size) and all(_is_size(n) for n in shape)
        for shape in shapes
    )


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**62


def check_pickles(megatron_folder: Path) -> None:
    """Refuse a torch_dist folder in which any pickle could run code, without executing it; call before megatron reads.

    Args:
        megatron_folder: the folder that contains `.metadata` and the `.distcp` files.

    Raises:
        UnsafePickle: names the file and the global.
        CorruptPickle: names the file that is truncated or changed.
        OSError: a file cannot be read.
    """
    format_file = megatron_folder / "metadata.json"
    content = json.loads(format_file.read_text())
    if not isinstance(content, dict) or content.get("sharded_backend") != "torch_dist":
        raise UnsafePickle(f"{format_file} names another format than torch_dist, the only one that is supported")
    metadata = read_metadata(megatron_folder)
    check_saved(megatron_folder / "common.pt", str(megatron_folder / "common.pt"))
    for what, data in _byte_entries(megatron_folder, metadata):
        check_saved(data, what)


def _byte_entries(folder: Path, metadata: Metadata) -> Iterator[tuple[str, bytes]]:
    """(entry and file, content) of every entry that is not a tensor."""
    for index, location in metadata.storage_data.items():
        name = location.relative_path
        if Path(name).name != name or location.transform_descriptors:
            raise UnsafePickle(f"{folder / '.metadata'} refers to {name}, where megatron-core never writes")
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            size = (folder / name).stat().st_size
            if location.offset + location.length > size:
                raise CorruptPickle(
                    f"{folder / name} is truncated: {size} of {location.offset + location.length} bytes"
                )
            with (folder / name).open("rb") as file:
                file.seek(location.offset)
                yield f"{index.fqn} in {folder / name}", file.read(location.length)
