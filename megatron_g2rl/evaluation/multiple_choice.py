"""Turns a row of a benchmark into the problem that is asked and the reference that it is compared with.

A benchmark's `prompt` is the user message. The options of a multiple-choice row get letters, and its reference becomes
the letter of the correct one. Options in one column each are shuffled, as the correct one always comes first; the order
follows from the row alone, so that it is the same in every evaluation.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable
from dataclasses import replace

from megatron_g2rl.config.benchmark import Benchmark
from megatron_g2rl.data.columns import value_at
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.data.sources import Row

_ABSENT = ("N/A", "")
"""Options that fill a list up to a fixed length."""


def rewriter(benchmark: Benchmark) -> Callable[[Row], Row] | None:
    """The function that rewrites the rows of a benchmark; None if they are asked as they are."""
    if benchmark.prompt == "{problem}" and not benchmark.choices:
        return None

    def rewrite(row: Row) -> Row:
        answer = row.answer
        lettered = ""
        if benchmark.choices:
            options, answer = _options(row, benchmark)
            lettered = "\n".join(
                f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options, strict=False)
            )
        if not isinstance(row.problem, str):
            raise ValueError(f"column {benchmark.prompt_column!r} is not text, which prompt needs")
        values = {"{problem}": row.problem.strip(), "{choices}": lettered}
        # in one pass, so that braces inside a value are not substituted
        problem = re.sub(r"\{problem\}|\{choices\}", lambda match: values[match[0]], benchmark.prompt)
        return replace(row, problem=problem, answer=answer)

    return rewrite


def _options(row: Row, benchmark: Benchmark) -> tuple[list[str], str]:
    """The options in the order of their letters, and the letter of the correct one.

    Raises:
        DataError: the row has no such column.
        ValueError: the row's options or its answer are invalid.
    """
    values = []
    for column in benchmark.choices:
        value = value_at(row.columns, column)
        if value is None:
            present = ", ".join(sorted(row.columns))
            raise DataError(f"choices: {row.file} has no column {column!r}; its columns are {present}")
        values.append(value)
    if len(values) == 1:
        return _listed(values[0], row.answer, benchmark)
    options = [str(value).strip() for value in values]
    correct = options[benchmark.choices.index(benchmark.answer_column)]
    if options.count(correct) > 1:
        raise ValueError(f"the correct option {correct[:60]!r} occurs twice")
    key = "\0".join([str(row.problem), *options])
    options.sort(key=lambda option: hashlib.blake2b(f"{key}\0{option}".encode(), digest_size=8).digest())
    return options, string.ascii_uppercase[options.index(correct)]


def _listed(value: object, answer: object, benchmark: Benchmark) -> tuple[list[str], str]:
    """The options of a column with a list, and the letter that the answer column gives as a letter or an index."""
    column = benchmark.choices[0]
    if not isinstance(value, (list, tuple)) or not 2 <= len(value) <= len(string.ascii_uppercase):
        raise ValueError(f"column {column!r} is not a list of 2 to 26 options")
    options = [str(option).strip() for option in value]
    while options[-1] in _ABSENT and len(options) > 2:
        options.pop()
    letters = string.ascii_uppercase[: len(options)]
    given = str(answer).strip().strip("()").upper()
    letter = letters[int(given)] if given.isdecimal() and int(given) < len(letters) else given
    if len(letter) != 1 or letter not in letters:
        raise ValueError(f"column {benchmark.answer_column!r} has {given[:20]!r}, not one of {letters} or an index")
    return options, letter
