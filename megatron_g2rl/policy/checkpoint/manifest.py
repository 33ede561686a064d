"""Sizes and checksums of a Megatron folder's files, used to detect incomplete or corrupt folders.

`manifest.json` is written last, into a folder that is renamed to its final name afterwards: a folder without it is
incomplete. The checksum is xxh3_128, which runs at memory speed; it detects accidents, not attacks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import xxhash

from megatron_g2rl.config.regular_files import special_files
from megatron_g2rl.config.run_files import MANIFEST

REMEDY = "Copy or convert it again"
"""Suggested fix for a corrupt folder that is not a checkpoint of the run itself."""
_BLOCK = 4 << 20


def checksum(path: Path) -> dict:
    """`{"bytes": size, "xxh3_128": hexadecimal digest}` of a file, read in blocks of 4 MiB.

    Raises:
        OSError: it cannot be read.
    """
    digest, size, block = xxhash.xxh3_128(), 0, memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def checksums(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict]:
    """`checksum` of every file in `folder` (or only of `names`, relative to it), except the manifest."""
    if names is None:
        names = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return {name: checksum(folder / name) for name in names if name != MANIFEST}


def write(folder: Path, files: Mapping[str, dict] | None = None) -> None:
    """Write `folder/manifest.json` with fsync, so that it is on disk when this returns.

    Args:
        folder: a Megatron folder whose other files are complete.
        files: known checksums (`checksums`), by path relative to the folder; None: compute them all.
    """
    files = checksums(folder) if files is None else files
    text = json.dumps({"version": 1, "files": dict(sorted(files.items()))}, indent=1)
    with (folder / MANIFEST).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def find_corruption(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a folder, one message per file; empty if all match the manifest.

    Args:
        folder: a Megatron folder.
        part: index of the part of the files to read, from 0; parts have about the same number of bytes.
        parts: number of parts that the files are split into.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        expected = {name: (_size(entry["bytes"]), str(entry["xxh3_128"])) for name, entry in files.items()}
    except FileNotFoundError:
        return [f"{MANIFEST} is missing: the folder is incomplete"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    folders = (folder, *(path for path in folder.iterdir() if path.is_dir()))
    if special := [path for subfolder in folders for path in special_files(subfolder)]:
        return [f"{special[0].relative_to(folder)} is not a regular file"]
    largest_first = sorted(expected, key=lambda name: (-expected[name][0], name))
    messages = (_difference(folder, name, *expected[name]) for name in largest_first[part::parts])
    return sorted(message for message in messages if message)


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is not a number of bytes")
    return value


def corruption_message(folder: str | Path, messages: Sequence[str]) -> str:
    """`FOLDER is corrupt: ...` with the first three of `messages`; common to all readers of Megatron folders."""
    more = f"; and {len(messages) - 3} more" if len(messages) > 3 else ""
    return f"{folder} is corrupt: {'; '.join(messages[:3])}{more}"


def _difference(folder: Path, name: str, size: int, digest: str) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return f"{MANIFEST} names a file outside the folder: {name}"
    try:
        actual = (folder / name).stat().st_size
        if actual != size:
            return (
                f"{name} is truncated: {actual} of {size} bytes"
                if actual < size
                else f"{name} has {actual - size} bytes too many"
            )
        return None if checksum(folder / name)["xxh3_128"] == digest else f"{name} has changed: its checksum differs"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
