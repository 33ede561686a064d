"""Makes sure that no pickle in a Megatron folder can run code, before megatron-core reads the folder.

The torch_dist format keeps pickles in three places: `.metadata` (read with pickle.load), `common.pt` (torch.load), and
byte entries inside the `.distcp` files (torch.load with weights_only=False). A pickle runs code by naming a global, a
function of some module, and calling it. Here every pickle is read once with each global replaced by an inert class:
nothing of what it names is imported or called. A name outside the short list of what megatron-core writes is refused.
Tensors inside the `.distcp` files need no check: torch reads them with weights_only=True.
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
    """What should be a pickle is none."""


ZIP = b"PK\x03\x04"
"""What a zip archive, and all that torch.save writes, begins with."""
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
    "_codecs": "encode",  # how protocol 2 writes bytes
}
_DTYPES = {("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def _pairs(names: dict[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(_DTYPES | {(module, name) for module, listed in names.items() for name in listed.split()})


METADATA_GLOBALS = _pairs(_METADATA)
"""(module, name) that `.metadata` may name."""
DATA_GLOBALS = _pairs(_DATA)
"""(module, name) that `common.pt` and byte entries may name."""


class _Sealed(type):
    def __setattr__(cls, name, value):
        raise pickle.UnpicklingError("it changes a class")


class _Inert(metaclass=_Sealed):
    """Stands for whatever a pickle builds: takes everything and does nothing."""

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
                "it is read; nothing was executed. Do not use this folder, and ask where it comes from"
            )
        return _Inert

    def persistent_load(self, key: Any) -> Any:
        return _Inert()


class _Metadata(pickle.Unpickler):
    """Loads `.metadata` with nothing but the classes that belong there."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in METADATA_GLOBALS:
            raise UnsafePickle(f".metadata names {module}.{name}")
        return super().find_class(module, name)


def check_pickle(stream: BinaryIO, what: str, allowed: frozenset[tuple[str, str]] = DATA_GLOBALS) -> None:
    """Refuse a pickle that names a global outside `allowed`, without executing it.

    Args:
        stream: at the start of the pickle.
        what: the file and place, for the message.
        allowed: (module, name) pairs.

    Raises:
        UnsafePickle: names the global.
        CorruptPickle: no whole pickle is there.
    """
    try:
        _Checker(stream, allowed, what).load()
    except UnsafePickle:
        raise
    except Exception as error:  # a broken pickle can raise anything
        raise CorruptPickle(f"{what}: no whole pickle is there ({type(error).__name__}: {error})") from error


def load_saved(path: Path) -> Any:
    """What torch.save wrote to a file: nothing but numbers, text, containers and tensors.

    The bytes that are checked are the bytes that are loaded.

    Raises:
        UnsafePickle: a pickle in it could run code.
        CorruptPickle: torch.save did not write it, or not all of it is there.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    check_saved(data, str(path))
    # With this variable torch reads pickles of any kind, whatever it is asked for.
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
        # A reader may look for an archive at the end, or for one of the older forms at the beginning.
        raise CorruptPickle(f"{what}: torch.save did not write it like this: it does not begin as a zip archive")
    try:
        archive = torch._C.PyTorchFileReader(io.BytesIO(content))
        records = archive.get_all_records()
        content = archive.get_record("data.pkl")
    except Exception as error:
        raise CorruptPickle(f"{what}: torch.save did not write it like this ({error})") from error
    if "constants.pkl" in records:
        raise UnsafePickle(f"{what} is a TorchScript program: it could run code when it is read; nothing was executed")
    check_pickle(io.BytesIO(content), what)


def read_metadata(megatron_folder: Path) -> Metadata:
    """The index of a torch_dist folder: which tensor lies where; nothing else can be in it.

    Raises:
        UnsafePickle: it names a global that does not belong there.
        CorruptPickle: it is cut off or changed.
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
    """Refuse an index whose parts are not of the types and ranges that torch writes.

    Raises:
        ValueError: names the part.
    """
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds a {type(metadata).__name__}")
    tensors, places = metadata.state_dict_metadata, metadata.storage_data
    if not isinstance(tensors, dict) or not isinstance(places, dict):
        raise ValueError("it lists no tensors, or no places")
    for key, stored in tensors.items():
        if type(key) is not str or not isinstance(stored, BytesStorageMetadata | TensorStorageMetadata):
            raise ValueError(f"{key!r:.80} is no tensor")
        if isinstance(stored, TensorStorageMetadata) and not _is_tensor(stored):
            raise ValueError(f"{key!r:.80} has a size, dtype or blocks that are none")
    for index, place in places.items():
        numbers = (place.offset, place.length) if isinstance(place, _StorageInfo) else ()
        if not isinstance(index, MetadataIndex) or not numbers or not all(_is_size(number) for number in numbers):
            raise ValueError(f"the place of {index!r:.80} is none")
        if type(place.relative_path) is not str:
            raise ValueError(f"the file of {index!r:.80} is {place.relative_path!r:.80}")


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
    """Refuse a torch_dist folder in which any pickle could run code, without executing one; call it before megatron.

    Args:
        megatron_folder: the folder that holds `.metadata` and the `.distcp` files.

    Raises:
        UnsafePickle: names the file and the global.
        CorruptPickle: names the file that is cut off or changed.
        OSError: a file cannot be read.
    """
    form = megatron_folder / "metadata.json"
    written = json.loads(form.read_text())
    if not isinstance(written, dict) or written.get("sharded_backend") != "torch_dist":
        raise UnsafePickle(f"{form} is of another format than torch_dist, which is all that is read here")
    metadata = read_metadata(megatron_folder)
    check_saved(megatron_folder / "common.pt", str(megatron_folder / "common.pt"))
    for what, data in _byte_entries(megatron_folder, metadata):
        check_saved(data, what)


def _byte_entries(folder: Path, metadata: Metadata) -> Iterator[tuple[str, bytes]]:
    """(place, content) of all that is not a tensor."""
    for index, place in metadata.storage_data.items():
        name = place.relative_path
        if Path(name).name != name or place.transform_descriptors:
            raise UnsafePickle(f"{folder / '.metadata'} sends a reader to {name}, where megatron-core never writes")
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            size = (folder / name).stat().st_size
            if place.offset + place.length > size:
                raise CorruptPickle(f"{folder / name} is cut off: {size} of {place.offset + place.length} bytes")
            with (folder / name).open("rb") as file:
                file.seek(place.offset)
                yield f"{index.fqn} in {folder / name}", file.read(place.length)
