"""Reads JSON row by row with the line of each, in bounded memory, whatever the rows are.

`datasets` drops a whole file for one broken line and cannot say which. Numbers keep the text that they are written as:
1e16 stays 1e16, and a number of 5,000 digits is no more than its text.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_g2rl.data.errors import DataError

LONGEST_LINE = 16 * 2**20
"""Bytes of one row; a longer one is bad."""


class IntText(str):
    """An integer as it is written."""


class FloatText(str):
    """A number with a point or an exponent as it is written."""


class NoNumber(str):
    """NaN or an infinity: Python writes them, JSON does not have them."""


_DECODER = json.JSONDecoder(parse_int=IntText, parse_float=FloatText, parse_constant=NoNumber)
_TOO_DEEP = "nested too deeply"


def json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line where it starts, decoded value) of a .json or .jsonl file, both also compressed (.gz).

    A row that cannot be decoded yields the ValueError that says why. Blank lines are passed over.

    Raises:
        DataError: the file cannot be read, or is a JSON array with broken syntax: nothing can be read past that.
    """
    line = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as opened:
            array = file.name.removesuffix(".gz").endswith(".json") and _is_array(opened)
            for line, value in _array(opened, file) if array else _lines(opened):  # noqa: B007
                yield line, value
    except (OSError, EOFError, zlib.error) as error:
        after = f" after line {line}" if line else ""
        raise DataError(f"{file} cannot be read{after}: {error}; copy it again") from error


def _lines(opened: BinaryIO) -> Iterator[tuple[int, Any]]:
    number = 0
    while line := opened.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while (rest := opened.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                pass
            yield number, ValueError(f"longer than {LONGEST_LINE >> 20} MiB")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield number, _DECODER.decode(text)
        except json.JSONDecodeError as error:  # its own text would call every line "line 1"
            yield number, ValueError(f"{error.msg}, column {error.colno}")
        except UnicodeDecodeError as error:
            yield number, error
        except RecursionError:
            yield number, ValueError(_TOO_DEEP)


def _is_array(opened: BinaryIO) -> bool:
    """Whether a .json file is one array; it may also hold JSON lines, as `datasets` takes them."""
    head = opened.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()
    opened.seek(0)
    return head.startswith(b"[")


def _array(opened: BinaryIO, file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, element); the whole text is in memory, for an array has no lines to read it by."""
    content = opened.read()
    try:
        text = content.decode("utf-8-sig")
        _DECODER.decode(text.strip())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: not UTF-8 ({error.reason}); the whole array is unreadable") from error
    except json.JSONDecodeError as error:
        line = error.lineno + text[: len(text) - len(text.lstrip())].count("\n")
        raise DataError(f"{file}:{line}: broken JSON ({error.msg}); the whole array is unreadable") from error
    except RecursionError:
        raise DataError(f"{file}: {_TOO_DEEP}; the whole array is unreadable") from None
    del content
    gap = re.compile(r"[\s,]*")
    line, counted = 1, 0
    start = gap.match(text, text.index("[") + 1).end()
    while text[start] != "]":
        line, counted = line + text.count("\n", counted, start), start
        record, end = _DECODER.raw_decode(text, start)
        yield line, record
        start = gap.match(text, end).end()
