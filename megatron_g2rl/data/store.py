"""Prompt rows in an Arrow table: small tables in memory, large ones memory-mapped from disk.

Prompts are stored as in the source and are rendered and encoded on access, so that a million of them do not take memory
as Python objects or tokens.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import datasets
from datasets.arrow_writer import ArrowWriter

from megatron_g2rl.data.errors import DataError

ROWS_AT_ONCE = 1000
"""Rows per written batch."""
ROWS_IN_MEMORY = 20_000
"""Tables with more rows are written to disk."""

COLUMNS = datasets.Features(
    {
        "id": datasets.Value("int64"),
        "file": datasets.Value("int32"),
        "line": datasets.Value("int64"),
        "part": datasets.Value("int32"),
        "several": datasets.Value("bool"),
        "problem": datasets.Value("large_string"),
        "answer": datasets.Value("large_string"),
        "columns": datasets.Value("large_string"),
    }
)
"""`part`: index in `data.sources`; `several`: `problem` is JSON of several messages; `columns`: JSON of the
columns that reward functions take, "" if there are none."""


class RowWriter:
    """Collects rows with `COLUMNS` and builds a dataset."""

    def __init__(self) -> None:
        """Start an empty table."""
        self._rows: list[tuple] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._writer: ArrowWriter | None = None

    def add(self, *row: object) -> None:
        """Append one row, with values in the order of `COLUMNS`.

        Raises:
            DataError: writing to disk failed.
        """
        self._rows.append(row)
        if len(self._rows) >= (ROWS_IN_MEMORY if self._writer is None else ROWS_AT_ONCE):
            self._flush()

    def finish(self) -> datasets.Dataset:
        """Build the dataset of all rows; no row can be added afterwards.

        Raises:
            DataError: writing to disk failed.
        """
        if self._writer is None:
            return datasets.Dataset.from_dict(_columns(self._rows), features=COLUMNS)
        self._flush()
        self._writer.finalize()
        rows = datasets.Dataset.from_file(str(self._file))
        self._folder.cleanup()  # the file stays mapped: its blocks are freed when the process ends
        return rows

    def _flush(self) -> None:
        try:
            if self._writer is None:
                cache = Path(datasets.config.HF_DATASETS_CACHE)
                cache.mkdir(parents=True, exist_ok=True)
                self._folder = tempfile.TemporaryDirectory(dir=cache, prefix="g2rl-rows-")
                self._file = Path(self._folder.name) / "rows.arrow"
                self._writer = ArrowWriter(path=str(self._file), features=COLUMNS)
            for start in range(0, len(self._rows), ROWS_AT_ONCE):
                self._writer.write_batch(_columns(self._rows[start : start + ROWS_AT_ONCE]))
        except OSError as error:
            raise DataError(
                f"the rows cannot be written to {datasets.config.HF_DATASETS_CACHE} ({error.strerror or error}): free "
                "disk space there, or set HF_DATASETS_CACHE to a folder on another disk"
            ) from error
        self._rows = []


def _columns(rows: list[tuple]) -> dict[str, list]:
    return dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True)) if rows else {c: [] for c in COLUMNS}
