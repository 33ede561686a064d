"""Changes of a folder since it was written are detected file by file."""

from __future__ import annotations

import json
import os

import pytest
import xxhash

from megatron_g2rl.policy.checkpoint import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "megatron").mkdir()
    for i, size in enumerate((0, 1, 5000, 9 << 20)):
        (tmp_path / "megatron" / f"__{i}_0.distcp").write_bytes(bytes(range(256)) * (size // 256 + 1))
    (tmp_path / "config.json").write_text("{}")
    manifest.write(tmp_path)
    return tmp_path


def test_an_unchanged_folder_is_complete_and_the_checksum_is_xxh3(folder):
    assert manifest.find_corruption(folder) == []
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {"config.json", *(f"megatron/__{i}_0.distcp" for i in range(4))}
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm, expected_message",
    [
        (flip, "has changed"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated: 5119 of 5120 bytes"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "1 bytes too many"),
        (lambda p: p.unlink(), "is missing"),
    ],
    ids=["flipped", "truncated", "longer", "missing"],
)
def test_corruption_is_reported_once_for_the_part_with_the_file(folder, harm, expected_message):
    name = "megatron/__2_0.distcp"
    harm(folder / name)
    found = [manifest.find_corruption(folder, part, 3) for part in range(3)]
    assert sorted(map(len, found)) == [0, 0, 1]
    (message,) = sum(found, [])
    assert message.startswith(name) and expected_message in message


@pytest.mark.parametrize(
    "text, expected_message",
    [
        (None, "incomplete"),
        ("{", "cannot be read"),
        ('{"files": {"../x": {"bytes": 1, "xxh3_128": ""}}}', "outside the folder"),
    ],
    ids=["none", "half", "outside"],
)
def test_an_invalid_manifest_is_corruption_too(folder, text, expected_message):
    (folder / "manifest.json").unlink()
    if text:
        (folder / "manifest.json").write_text(text)
    (message,) = manifest.find_corruption(folder)
    assert expected_message in message


def test_known_checksums_are_not_computed_again(tmp_path):
    manifest.write(tmp_path, {"a": {"bytes": 1, "xxh3_128": "0" * 32}})
    assert manifest.find_corruption(tmp_path) == ["a is missing"]


def test_a_pipe_among_the_files_is_reported_without_opening_it(tmp_path):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "a").write_text("a")
    manifest.write(tmp_path)
    assert not manifest.find_corruption(tmp_path)
    os.mkfifo(tmp_path / "megatron" / "common.pt")
    assert manifest.find_corruption(tmp_path) == ["megatron/common.pt is not a regular file"]


@pytest.mark.parametrize("size", [float("inf"), -1, 1.5, "1", None, True])
def test_an_invalid_size_makes_a_manifest_unreadable(tmp_path, size):
    (tmp_path / "a").write_text("a")
    manifest.write(tmp_path)
    written = json.loads((tmp_path / "manifest.json").read_text())
    written["files"]["a"]["bytes"] = size
    (tmp_path / "manifest.json").write_text(json.dumps(written))
    assert "manifest.json cannot be read" in manifest.find_corruption(tmp_path)[0]
