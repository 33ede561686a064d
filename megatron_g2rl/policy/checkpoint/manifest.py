"""The list of a Megatron folder's files with their sizes and checksums: what tells a whole folder from a damaged one.

`manifest.json` is written last, into a folder that is renamed to its final name afterwards: a folder without it was
never finished. The checksum is xxh3_128, which is as fast as memory; it finds accidents, not attacks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import xxhash

from megatron_g2rl.config.regular_files import special_files

NAME = "manifest.json"
REMEDY = "Copy or convert it again"
"""What to do about a damaged folder that is no checkpoint of the run itself."""
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
    """`checksum` of every file of `folder` (of `names`, relative to it), the manifest left out."""
    if names is None:
        names = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return {name: checksum(folder / name) for name in names if name != NAME}


def write(folder: Path, files: Mapping[str, dict] | None = None) -> None:
    """Write `folder/manifest.json`, and leave it to nobody's cache: it is on the disk when this returns.

    Args:
        folder: a Megatron folder whose other files are finished.
        files: checksums that are known already (`checksums`), by path relative to the folder; None: all are read.
    """
    files = checksums(folder) if files is None else files
    text = json.dumps({"version": 1, "files": dict(sorted(files.items()))}, indent=1)
    with (folder / NAME).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def damaged(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a folder, one message each; empty when all are as they were written.

    Args:
        folder: a Megatron folder.
        part: which share of the files to read, of `parts`; the shares are of about the same number of bytes.
        parts: into how many shares the files are dealt.
    """
    try:
        files = json.loads((folder / NAME).read_text())["files"]
        expected = {name: (_size(entry["bytes"]), str(entry["xxh3_128"])) for name, entry in files.items()}
    except FileNotFoundError:
        return [f"{NAME} is missing: the folder was never finished"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{NAME} cannot be read ({type(error).__name__}: {error})"]
    folders = (folder, *(path for path in folder.iterdir() if path.is_dir()))
    if special := [path for place in folders for path in special_files(place)]:
        return [f"{special[0].relative_to(folder)} is no regular file"]
    largest_first = sorted(expected, key=lambda name: (-expected[name][0], name))
    messages = (_difference(folder, name, *expected[name]) for name in largest_first[part::parts])
    return sorted(message for message in messages if message)


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is no number of bytes")
    return value


def damage(folder: str | Path, messages: Sequence[str]) -> str:
    """`FOLDER is damaged: ...` with the first three of `messages`: what every reader of Megatron folders says."""
    more = f"; and {len(messages) - 3} more" if len(messages) > 3 else ""
    return f"{folder} is damaged: {'; '.join(messages[:3])}{more}"


def _difference(folder: Path, name: str, size: int, digest: str) -> str | None:
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        return f"{NAME} names a file outside the folder: {name}"
    try:
        here = (folder / name).stat().st_size
        if here != size:
            return (
                f"{name} is cut off: {here} of {size} bytes" if here < size else f"{name} has {here - size} bytes more"
            )
        return None if checksum(folder / name)["xxh3_128"] == digest else f"{name} has changed: its checksum is another"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
