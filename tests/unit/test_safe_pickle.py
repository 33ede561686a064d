"""No pickle of a Megatron folder is executed, wherever it is; files written by megatron-core pass."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
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
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from megatron_g2rl.policy.checkpoint.safe_pickle import (
    CorruptPickle,
    UnsafePickle,
    check_index,
    check_pickle,
    check_pickles,
    check_saved,
    load_saved,
    read_metadata,
)


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(value) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Builds a torch_dist folder with one tensor and one byte entry."""

    def build(common=None, entry=None, metadata=None, **place):
        folder = tmp_path / "megatron"
        folder.mkdir()
        tensor, entry = saved(torch.ones(3)), entry or saved([torch.zeros(2, dtype=torch.uint8), io.BytesIO(b"a")])
        (folder / "__0_0.distcp").write_bytes(tensor + entry)
        properties = TensorStorageMetadata(
            TensorProperties(), torch.Size([3]), [ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))]
        )
        index = Metadata({"weight": properties, "extra": BytesStorageMetadata()})
        where = dict(relative_path="__0_0.distcp", offset=len(tensor), length=len(entry)) | place
        index.storage_data = {
            MetadataIndex("weight", torch.Size([0]), 0): _StorageInfo("__0_0.distcp", 0, len(tensor)),
            MetadataIndex("extra"): _StorageInfo(**where),
        }
        (folder / ".metadata").write_bytes(pickle.dumps(index if metadata is None else metadata))
        state = {"optimizer": {"lr": 0.1, "betas": (0.9, 0.99)}, "dtype": torch.bfloat16, "t": torch.ones(2), "b": b"x"}
        (folder / "common.pt").write_bytes(common or saved(state))
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
        return folder

    return build


def test_a_folder_written_by_megatron_passes(folder):
    place = folder()
    check_pickles(place)
    assert set(read_metadata(place).state_dict_metadata) == {"weight", "extra"}


@pytest.mark.parametrize("where", ["metadata", "common", "entry"])
def test_a_malicious_pickle_is_reported_by_name_and_not_executed(where, folder, tmp_path):
    payload = Payload(tmp_path / "executed")
    place = folder(**{where: payload if where == "metadata" else saved({"x": [payload]})})
    with pytest.raises(UnsafePickle, match="mkdir.*nothing was executed") as raised:
        check_pickles(place)
    named = dict(metadata=".metadata", common="common.pt", entry="__0_0.distcp")[where]
    assert named in str(raised.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(eval),
        b"\x80\x04\x8c\x05torch\x8c\nos.systemxx\x93.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"(S'true'\niposix\nsystem\n.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04c_io\nBytesIO\nN}\x8c\x06appendNs\x86b.",
    ],
    ids=["builtins", "dotted", "global", "inst", "torch_load", "extension", "class_change"],
)
def test_every_way_to_refer_to_a_global_is_detected(content):
    with pytest.raises(UnsafePickle):
        check_pickle(io.BytesIO(content), "here")


def test_legacy_formats_of_torch_save_are_refused(folder, tmp_path):
    stream = io.BytesIO()
    torch.save(Payload(tmp_path / "executed"), stream, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafePickle, match="common.pt"):
        check_pickles(folder(common=stream.getvalue()))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd"])
def test_entries_outside_the_folder_are_refused(name, folder):
    with pytest.raises(UnsafePickle, match="never writes"):
        check_pickles(folder(relative_path=name))


def test_a_truncated_index_is_corruption(folder):
    place = folder()
    (place / ".metadata").write_bytes((place / ".metadata").read_bytes()[:-20])
    with pytest.raises(CorruptPickle, match="no complete pickle|not written by torch.save"):
        check_pickles(place)


def polyglot(marker: Path) -> bytes:
    """A pickle in torch's legacy format, which runs code, followed by a harmless zip archive."""
    out, harmless = io.BytesIO(), io.BytesIO()
    sizes = dict(protocol_version=PROTOCOL_VERSION, little_endian=True, type_sizes=dict(short=2, int=4, long=4))
    for item in (MAGIC_NUMBER, PROTOCOL_VERSION, sizes, Touch(marker), []):
        pickle.dump(item, out, 2)
    torch.save([None], harmless)
    with zipfile.ZipFile(harmless) as source, zipfile.ZipFile(out, "a", zipfile.ZIP_STORED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry.filename))
    return out.getvalue()


class Touch:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("forced", ["", "1"])
def test_a_file_that_two_readers_parse_differently_is_refused_by_checker_and_loader(tmp_path, monkeypatch, forced):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    marker, file = tmp_path / "code_ran", tmp_path / "common.pt"
    file.write_bytes(polyglot(marker))
    for read in (lambda: check_saved(file, "common.pt"), lambda: check_saved(file.read_bytes(), "common.pt")):
        with pytest.raises(CorruptPickle, match="does not start like a zip archive"):
            read()
    with pytest.raises(CorruptPickle):
        load_saved(file)
    torch.save({"a": Touch(marker)}, file)
    with pytest.raises(UnsafePickle):
        load_saved(file)
    assert not marker.exists()


def test_what_is_loaded_is_what_was_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    saved = {"step": 3, "name": "x", "table": torch.arange(4.0), "list": [None, True, 1.5]}
    torch.save(saved, tmp_path / "common.pt")
    loaded = load_saved(tmp_path / "common.pt")
    assert torch.equal(loaded.pop("table"), saved.pop("table")) and loaded == saved
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def _with(**changes) -> Metadata:
    """An index with one tensor, with one part changed."""
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([3]))
    parts = dict(size=torch.Size([3]), chunks=[chunk], dtype=torch.float32, offset=0, length=9, relative_path="a")
    parts |= changes
    stored = TensorStorageMetadata(TensorProperties(parts["dtype"]), parts["size"], parts["chunks"])
    index = Metadata({"weight": stored})
    place = _StorageInfo(parts["relative_path"], parts["offset"], parts["length"])
    index.storage_data = {MetadataIndex("weight", torch.Size([0]), 0): place}
    for name in ("state_dict_metadata", "storage_data"):
        setattr(index, name, parts.get(name, getattr(index, name)))
    return index


@pytest.mark.parametrize(
    "changes",
    [
        dict(storage_data=None),
        dict(storage_data={"weight": 1}),
        dict(state_dict_metadata=[]),
        dict(state_dict_metadata={"weight": 5}),
        dict(relative_path=7),
        dict(offset=-1),
        dict(length="9"),
        dict(length=2**70),
        dict(size=None),
        dict(size=torch.Size([1, 3])),
        dict(chunks=None),
        dict(chunks=[None]),
        dict(dtype="float32"),
    ],
)
def test_an_index_with_a_part_that_torch_never_writes_is_reported_as_unreadable(folder, changes):
    check_index(_with())
    place = folder(metadata=_with(**changes))
    with pytest.raises(CorruptPickle, match=r"\.metadata cannot be read"):
        read_metadata(place)
