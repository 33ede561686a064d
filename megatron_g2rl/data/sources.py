"""Reads the rows of a data source (hub dataset, local file, folder, built-in task) with the place each one came from.

JSON is read line by line here instead of by `datasets`, whose loader drops a whole file for one broken line and cannot
say which. Parquet and hub data go through `datasets`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from megatron_g2rl.config.tree import DataConfig
from megatron_g2rl.data.tasks import BUILTIN_TASKS, DATASET_SEED, Task
from megatron_g2rl.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
SPLIT_WORDS = {
    "train": "train|training",
    "test": "test|testing|eval|evaluation",
    "validation": "validation|valid|dev|val",
}
"""Words in the name of a file (or its folder) that give it to a split, as the hub reads them."""


class DataError(UserError):
    """The data source cannot be used as configured; the message says where and what to do."""


@dataclass(frozen=True)
class Row:
    """One row of a source, or what is wrong with it."""

    where: str
    """`file.jsonl:12`: file and line, counted from 1 (for parquet and hub data, the row's number)."""
    values: dict[str, Any]
    """Value of the problem and the answer column, as found; absent when the row has none."""
    fault: str = ""
    """Why the row could not be read at all."""


def read_rows(config: DataConfig) -> Iterator[Row]:
    """Yield all rows of `config.source`, in their order, unreadable ones too.

    Raises:
        DataError: the source, its split or one of its columns does not exist.
    """
    if config.source.startswith("builtin:"):
        yield from _read_task(config)
        return
    path = Path(config.source).expanduser()
    if path.is_dir():
        for file in _files_of_split(path, config.split):
            yield from _read_file(file, config)
    elif path.is_file():
        yield from _read_file(path, config)
    elif path.suffix in SUFFIXES or config.source.startswith((".", "/", "~")):
        raise DataError(f"data.source: there is no file or folder {config.source!r} (looked from {Path.cwd()})")
    else:
        yield from _read_hub(config)


def builtin_task(source: str) -> Task:
    """The task that `builtin:NAME` names.

    Raises:
        DataError: there is none of that name.
    """
    name = source.removeprefix("builtin:")
    if name not in BUILTIN_TASKS:
        raise DataError(f"data.source: no built-in task {name!r}; there is {', '.join(sorted(BUILTIN_TASKS))}")
    return BUILTIN_TASKS[name]


def _read_task(config: DataConfig) -> Iterator[Row]:
    task = builtin_task(config.source)
    if config.split not in task.problems:
        raise DataError(f"data.split: {config.source} has no split {config.split!r}; it has {', '.join(task.problems)}")
    for index in range(task.problems[config.split]):
        problem, answer = task.problem(index, DATASET_SEED, config.split)
        yield Row(f"{config.source}:{index + 1}", {config.prompt_column: problem, config.answer_column: answer})


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Files of `folder` (sorted, subfolders too) of a split; without split words in any name all are `train`."""
    files = sorted(file for file in folder.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"data.source: folder {folder} holds no {', '.join(SUFFIXES)} file")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        name = str(file.relative_to(folder)).lower()
        named = [s for s, words in SPLIT_WORDS.items() if re.search(rf"(?<![a-z])({words})(?![a-z])", name)]
        by_split.setdefault(named[0] if named else "", []).append(file)
    unnamed = by_split.pop("", [])
    if not by_split:
        by_split["train"] = unnamed
    elif unnamed:
        raise DataError(
            f"data.source: folder {folder} has files of a split ({', '.join(sorted(by_split))}) and others of none, "
            f"such as {unnamed[0].name}: put train, test or validation into each name, or name one file as data.source"
        )
    if split not in by_split:
        raise DataError(f"data.split: folder {folder} has no files for {split!r}; it has {', '.join(sorted(by_split))}")
    return by_split[split]


def _read_file(file: Path, config: DataConfig) -> list[Row]:
    if file.suffix == ".parquet":
        try:
            table = datasets.Dataset.from_parquet(str(file), keep_in_memory=True)
        except (pyarrow.ArrowException, datasets.exceptions.DatasetGenerationError, OSError) as error:
            raise DataError(f"{file} is not a readable parquet file: {error.__cause__ or error}") from error
        return list(_read_table(table, str(file), config))
    if file.suffix == ".jsonl":
        return _select(file, _json_lines(file), config)
    if file.suffix == ".json":
        return _select(file, _json_array(file), config)
    raise DataError(f"data.source: {file} is none of {', '.join(SUFFIXES)}")


def _read_hub(config: DataConfig) -> Iterator[Row]:
    try:
        table = datasets.load_dataset(config.source, config.subset, split=config.split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:  # OSError: no network
        raise DataError(
            f"data.source={config.source!r} (data.subset={config.subset}, data.split={config.split!r}) is no file here "
            f"and did not load from the hub: {error}"
        ) from error
    yield from _read_table(table, f"{config.source}[{config.split}]", config)


def _read_table(table: datasets.Dataset, name: str, config: DataConfig) -> Iterator[Row]:
    _require_columns(table.column_names, name, config)
    table = table.select_columns(list(dict.fromkeys([config.prompt_column, config.answer_column])))
    for index, values in enumerate(table):
        yield Row(f"{name}:{index + 1}", values)


def _require_columns(columns: list[str], name: str, config: DataConfig) -> None:
    for key, column in [("prompt_column", config.prompt_column), ("answer_column", config.answer_column)]:
        if column not in columns:
            raise DataError(f"data.{key}: {name} has no column {column!r}; its columns are {', '.join(columns)}")


def _select(file: Path, records: Iterator[tuple[int, Any]], config: DataConfig) -> list[Row]:
    """Rows of a JSON file from (line, decoded value); a column that no row has is an error, as in a table."""
    rows = []
    columns: dict[str, None] = {}
    for line, record in records:
        where = f"{file}:{line}"
        if isinstance(record, dict):
            columns |= dict.fromkeys(record)
            wanted = {config.prompt_column, config.answer_column} & record.keys()
            rows.append(Row(where, {column: record[column] for column in wanted}))
        elif isinstance(record, ValueError):
            rows.append(Row(where, {}, f"unreadable: {record}"))
        else:
            rows.append(Row(where, {}, f"not a JSON object but {type(record).__name__}"))
    if columns:
        _require_columns(list(columns), str(file), config)
    return rows


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number, decoded line or the error it raised); blank lines are passed over."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if not line:
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except json.JSONDecodeError as error:  # its own text would call every line "line 1"
                yield number, ValueError(f"{error.msg}, column {error.colno}")
            except UnicodeDecodeError as error:
                yield number, error


def _json_array(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line where it starts, element) of a JSON array; nothing can be read once its syntax is broken."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no UTF-8 text ({error}): write it again as UTF-8") from error
    if not text.lstrip().startswith("["):
        yield from _json_lines(file)  # JSON lines under the name .json, as `datasets` takes them
        return
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: broken JSON ({error.msg}); the whole array is unreadable") from error
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    line, counted = 1, 0
    start = gap.match(text, text.index("[") + 1).end()
    while text[start] != "]":
        line, counted = line + text.count("\n", counted, start), start
        record, end = decoder.raw_decode(text, start)
        yield line, record
        start = gap.match(text, end).end()
