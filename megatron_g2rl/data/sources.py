"""Reads the rows of a data source (Hub dataset, local file, folder, built-in task) with the location of each row.

JSON is read row by row; Parquet, Arrow and Hub data are read through `datasets`, which memory-maps them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from megatron_g2rl.config.inputs import PROMPT_FILES
from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.data.columns import column_names, value_at
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.data.json_rows import json_rows
from megatron_g2rl.data.layout import files_of
from megatron_g2rl.data.tasks import DATASET_SEED, Task
from megatron_g2rl.distributed.collectives import own_rank
from megatron_g2rl.distributed.hub import fetch_once
from megatron_g2rl.registry import TASKS
from megatron_g2rl.rewards.binding import ALL_COLUMNS

__all__ = ["DataError", "Row", "builtin_task", "read_rows"]

_ROWS_AT_ONCE = 1000
_MOST_COLUMNS = 200
"""Maximum column names collected for the message about a missing column."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source, or the reason why it is invalid."""

    file: str
    """File name, or name of the source."""
    line: int
    """Line number in the file, from 1 (for tables, the row number)."""
    problem: Any = None
    """Raw value of the problem column; None if missing."""
    answer: Any = None
    """Raw value of the answer column; None if missing."""
    fault: str = ""
    """Why the row could not be read; "" if it was."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Requested columns."""

    @property
    def where(self) -> str:
        """`file.jsonl:12`."""
        return f"{self.file}:{self.line}"


def read_rows(config: DataConfig, wanted: Collection[str] = (), names: set[str] | None = None) -> Iterator[Row]:
    """Yield all rows of `config.source` in order, including unreadable ones.

    Args:
        config: the source.
        wanted: columns to keep in `Row.columns`, if present; `ALL_COLUMNS` for all of them.
        names: set to which column names are added while rows are read.

    Raises:
        DataError: the source, its split or one of its columns does not exist.
    """
    source = config.source
    path = Path(source).expanduser()
    picked = _Columns(wanted, set() if names is None else names)
    if source.startswith("builtin:"):
        yield from _read_task(config, picked)
    elif path.is_dir():
        for file in files_of(path, config):
            yield from _read_file(file, config, picked)
    elif path.is_file():
        yield from _read_file(path, config, picked)
    elif source.endswith(PROMPT_FILES) or source.startswith((".", "/", "~")):
        raise DataError(f"data.source: there is no file or folder {source!r} (relative paths start at {Path.cwd()})")
    else:
        yield from _read_hub(config, picked)


@dataclass(frozen=True)
class _Columns:
    """Selects the columns of a row to keep in addition to problem and answer."""

    wanted: Collection[str]
    names: set[str]
    """Names of all columns seen."""

    def of(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The wanted columns of a row."""
        if not self.wanted:
            return {}
        self.names.update(record)
        return {name: value for name, value in record.items() if self.wants(name)}

    def wants(self, name: str) -> bool:
        """Whether a column is kept."""
        return name in self.wanted or ALL_COLUMNS in self.wanted


def builtin_task(source: str) -> Task:
    """The built-in task `builtin:NAME`.

    Raises:
        DataError: there is no task of that name.
    """
    name = source.removeprefix("builtin:")
    if name not in TASKS:
        raise DataError(f"data.source: no built-in task {name!r}; available: {', '.join(sorted(TASKS))}")
    return TASKS[name]


def _read_task(config: DataConfig, picked: _Columns) -> Iterator[Row]:
    task = builtin_task(config.source)
    if config.split not in task.problems:
        raise DataError(f"data.split: {config.source} has no split {config.split!r}; it has {', '.join(task.problems)}")
    for index in range(task.problems[config.split]):
        problem, answer = task.problem(index, DATASET_SEED, config.split)
        columns = picked.of({"problem": problem, "answer": answer, "builtin_task": task.name})
        yield Row(config.source, index + 1, problem, answer, columns=columns)


def _read_file(file: Path, config: DataConfig, picked: _Columns) -> Iterator[Row]:
    if not file.name.endswith(PROMPT_FILES):
        raise DataError(f"data.source: {file} has none of the extensions {', '.join(PROMPT_FILES)}")
    if file.suffix in (".parquet", ".arrow"):
        try:
            table = _table(file)
        except (pyarrow.ArrowException, datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            reason = error.__cause__ or error
            raise DataError(f"{file} is not a readable {file.suffix[1:]} file: {reason}") from error
        yield from _read_table(table, str(file), config, picked)
        return
    yield from _read_json(file, config, picked)


def _table(file: Path) -> datasets.Dataset:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()  # it would appear in the log of every rank
    try:
        if file.suffix == ".parquet":
            return datasets.Dataset.from_parquet(str(file))
        return datasets.load_dataset("arrow", data_files=[str(file)], split="train")
    finally:
        if shown:
            datasets.enable_progress_bar()


def _read_hub(config: DataConfig, picked: _Columns) -> Iterator[Row]:
    """Rows of a Hub dataset; a collective in which one rank downloads for all that share a cache."""
    table: datasets.Dataset | None = None

    def fetch() -> tuple[str | None, list[str], int]:
        nonlocal table
        try:
            table = _load_from_hub(config)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:  # OSError: no network
            return str(error), [], 0
        return None, [file["filename"] for file in table.cache_files], len(table)

    outcomes = fetch_once(Path(datasets.config.HF_DATASETS_CACHE), fetch)
    if problem := next((problem for problem, _, _ in outcomes if problem), None):
        raise DataError(
            f"data.source={config.source!r} (data.subset={config.subset}, data.split={config.split!r}) is not a local "
            f"file or folder, and loading it from the Hugging Face Hub failed: {problem}"
        )
    if table is None:
        table = _open_cached(config, *outcomes[own_rank()][1:])
    yield from _read_table(table, f"{config.source}[{config.split}]", config, picked)


def _load_from_hub(config: DataConfig) -> datasets.Dataset:
    return datasets.load_dataset(config.source, config.subset, split=config.split)


def _open_cached(config: DataConfig, files: list[str], rows: int) -> datasets.Dataset:
    """Open the table that another rank loaded from the Hub from its cache files, without a request.

    Args:
        files: cache files of the table.
        rows: expected number of rows.
    """
    if files:
        table = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
        if len(table) == rows:
            return table
    return _load_from_hub(config)  # a slice of a split, or an in-memory table


def _read_table(table: datasets.Dataset, name: str, config: DataConfig, picked: _Columns) -> Iterator[Row]:
    tops = {column if column in table.column_names else column.partition(".")[0] for column in _columns(config)}
    seen = _SeenColumns(name, config)
    known = [column for column in table.column_names if column in tops]
    if len(known) < len(tops):
        raise seen.missing(next(c for c in _columns(config) if not {c, c.partition(".")[0]} & set(known)), table)
    picked.names.update(table.column_names)
    # Images, audio and video are decoded on access and cannot be stored as JSON.
    plain = [column for column, feature in table.features.items() if not hasattr(feature, "decode_example")]
    known += [column for column in plain if column not in known and picked.wants(column)]
    line = 0
    for batch in table.select_columns(known).iter(_ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            line += 1
            record = dict(zip(batch, values, strict=True))
            yield replace(seen.row(line, record), columns=picked.of(record))
    seen.check()


def _read_json(file: Path, config: DataConfig, picked: _Columns) -> Iterator[Row]:
    seen = _SeenColumns(str(file), config)
    for line, record in json_rows(file):
        if isinstance(record, dict):
            yield replace(seen.row(line, record), columns=picked.of(record))
        elif isinstance(record, ValueError):
            yield Row(str(file), line, fault=f"unreadable: {record}")
        else:
            kind = "a number or text" if isinstance(record, str) else type(record).__name__
            yield Row(str(file), line, fault=f"not a JSON object but {kind}")
    seen.check()


def _columns(config: DataConfig) -> tuple[str, str]:
    return config.prompt_column, config.answer_column


class _SeenColumns:
    """Extracts problem and answer from rows; a column that no row has is one error instead of many bad rows."""

    def __init__(self, name: str, config: DataConfig) -> None:
        """Start a file or table called `name`."""
        self._name, self._config = name, config
        self._names: dict[str, None] = {}
        self._present: set[str] = set()

    def row(self, line: int, record: Mapping[str, Any]) -> Row:
        """Convert a record to a row."""
        values = {column: value_at(record, column) for column in _columns(self._config)}
        if len(self._present) < len(values):
            self._present |= {column for column, value in values.items() if value is not None or column in record}
            if len(self._names) < _MOST_COLUMNS:
                self._names |= dict.fromkeys(column_names(record))
        return Row(self._name, line, values[self._config.prompt_column], values[self._config.answer_column])

    def check(self) -> None:
        """Refuse a source in which no row has one of the two columns.

        Raises:
            DataError: names the missing column and the existing ones.
        """
        for column in _columns(self._config):
            if self._names and column not in self._present:
                raise self.missing(column)

    def missing(self, column: str, table: datasets.Dataset | None = None) -> DataError:
        """The error for a missing column."""
        names = list(self._names) if table is None else column_names(table[0] if len(table) else table.features)
        key = "prompt_column" if column == self._config.prompt_column else "answer_column"
        shown = ", ".join(name.encode("ascii", "backslashreplace").decode() for name in names[:_MOST_COLUMNS])
        return DataError(f"data.{key}: {self._name} has no column {column!r}; its columns are {shown[:2000]}")
