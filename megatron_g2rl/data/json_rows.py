"""Reads JSON row by row with line numbers, in bounded memory.

`datasets` rejects a complete file for one invalid line and does not report which. Numbers keep their text: 1e16 stays
1e16, and a number of 5,000 digits stays text.
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
"""Maximum bytes of one row; longer ones are bad."""


class IntText(str):
    """The text of an integer."""


class FloatText(str):
    """The text of a number with a decimal point or an exponent."""


class NoNumber(str):
    """The text of NaN or an infinity, which Python writes but JSON does not allow."""


_DECODER = json.JSONDecoder(parse_int=IntText, parse_float=FloatText, parse_constant=NoNumber)
_TOO_DEEP = "nested too deeply"


def json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (first line, decoded value) for each row of a .json or .jsonl file, optionally compressed (.gz).

    A row that cannot be decoded yields a ValueError with the reason. Blank lines are skipped.

    Raises:
        DataError: the file cannot be read, or is a JSON array with invalid syntax.
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
        except json.JSONDecodeError as error:  # str(error) would report every line as "line 1"
            yield number, ValueError(f"{error.msg}, column {error.colno}")
        except UnicodeDecodeError as error:
            yield number, error
        except RecursionError:
            yield number, ValueError(_TOO_DEEP)


def _is_array(opened: BinaryIO) -> bool:
    """Whether a .json file is one array; like in `datasets`, it may also hold JSON lines."""
    head = opened.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()
    opened.seek(0)
    return head.startswith(b"[")


def _array(opened: BinaryIO, file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, element); the complete text is in memory, as an array cannot be read by lines."""
    content = opened.read()
    try:
        text = content.decode("utf-8-sig")
        _DECODER.decode(text.strip())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: not UTF-8 ({error.reason}); the array cannot be read") from error
    except json.JSONDecodeError as error:
        line = error.lineno + text[: len(text) - len(text.lstrip())].count("\n")
        raise DataError(f"{file}:{line}: invalid JSON ({error.msg}); the array cannot be read") from error
    except RecursionError:
        raise DataError(f"{file}: {_TOO_DEEP}; the array cannot be read") from None
    del content
    gap = re.compile(r"[\s,]*")
    line, counted = 1, 0
    start = gap.match(text, text.index("[") + 1).end()
    while text[start] != "]":
        line, counted = line + text.count("\n", counted, start), start
        record, end = _DECODER.raw_decode(text, start)
        yield line, record
        start = gap.match(text, end).end()
