"""Datasets: rows of every kind in JSON lines, JSON arrays, Parquet and folders, and the keys that control reading."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from tools.fuzz.case import Work
from tools.fuzz.values import NUMBERS, TEXTS, change_bytes, change_tree, hostile, nested

SETTINGS = (
    (),
    (),
    ("data.on_bad_row=skip",),
    ("data.on_bad_row=skip",),
    ("data.template=plain", "data.on_bad_row=skip"),
    ("data.prompt_column=answer", "data.answer_column=problem"),
    ("data.prompt_column=a.b", "data.on_bad_row=skip"),
    ("data.max_prompt_tokens=4", "data.on_bad_row=skip"),
    ("data.shuffle=false",),
    ("data.split=test",),
)


def make(work: Work) -> None:
    """`train` for one step with a changed dataset, as the training or the evaluation set."""
    work.copy("model", "config.yaml", "problems.jsonl")
    kind = work.random.choice(("jsonl", "jsonl", "jsonl", "json", "parquet", "folder"))
    rows = [dict(row) for row in work.seeds.rows]
    answers = work.random.choice((None, None, 3, 2.5, True, None))
    columns = work.random.random() < 0.2
    for row in rows:
        if answers is not None:
            row["answer"] = answers
        if columns:
            row["a"] = {"b": row["problem"]}
            row["messages"] = [{"role": "user", "content": row["problem"]}]
    lines: list = list(rows)
    noise: list[Random] = []
    for random in work.changes():
        if random.random() < 0.15:
            noise.append(random)
        else:
            lines = _change_rows(lines, random)
    name = f"data.{kind}"
    file = work.folder / name
    if kind == "parquet":
        _write_parquet(file, lines)
    elif kind == "folder":
        file.mkdir()
        (file / work.random.choice(("train.jsonl", "a.jsonl", "test-1.json"))).write_text(_json_lines(lines))
        (file / work.random.choice(("valid.jsonl", "b.parquet", "readme.md"))).write_text(_json_lines(rows))
        file = min(file.iterdir())
    else:
        file.write_text(_json_lines(lines) if kind == "jsonl" else json.dumps(lines, indent=1))
    for random in noise:
        file.write_bytes(change_bytes(file.read_bytes(), random))
    source = [f"data.source={name}"]
    if work.random.random() < 0.2:
        source = [f"evaluation.source={name}", "evaluation.prompts=2", "evaluation.responses_per_prompt=2"]
    work.arguments = ["train", "config.yaml", *source, *work.random.choice(SETTINGS)]
    if work.random.random() < 0.1:
        work.arguments += ["trainer.prompts_per_step=8", "trainer.responses_per_update=16"]


def _change_rows(rows: list, random: Random) -> list:
    """Change one row, or one column of one or all rows."""
    kind = random.random()
    if kind < 0.45 or not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return change_tree(rows, random) if random.random() < 0.9 else hostile(random)
    column = random.choice(sorted(rows[0]) or ["problem"])
    at = random.randrange(len(rows))
    deep = nested(random.choice((3, 200)))
    value = random.choice((random.choice(NUMBERS), random.choice(TEXTS), hostile(random), deep))
    if kind < 0.85:
        return [row | {column: value} if index == at else row for index, row in enumerate(rows)]
    return [row | {column: value} for row in rows]


def _json_lines(rows) -> str:
    rows = rows if isinstance(rows, list) else [rows]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write_parquet(file: Path, rows) -> None:
    """Write the rows as Parquet, or, if Arrow cannot represent them, as JSON in a file named .parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    except Exception:  # Arrow raises many kinds of exceptions for invalid rows
        file.write_text(_json_lines(rows))
