"""Reads problem and reference answer of a row in common storage formats: text, chat messages, numbers, nested columns.

An invalid value raises `ValueError` with the reason; the caller adds file and line.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import regex

from megatron_g2rl.config.sections.data import DataConfig
from megatron_g2rl.data.errors import DataError
from megatron_g2rl.data.json_rows import FloatText, IntText, NoNumber
from megatron_g2rl.rewards.boxed import last_boxed

ROLES = ("system", "user", "assistant")
_SHOWN = 60
MATCH_SECONDS = 1.0
"""Time limit of `data.answer_regex` for one answer, as some patterns take exponential time."""
_NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def value_at(record: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or None if it is missing; dots address nested columns (`reward_model.ground_truth`)."""
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def column_names(record: Mapping[str, Any]) -> list[str]:
    """Column names of a row; nested ones are joined by dots."""
    return [
        f"{name}.{inner}" if inner else name
        for name, value in record.items()
        for inner in (value if isinstance(value, Mapping) and value else ("",))
    ]


def read_messages(value: Any, column: str, template: str) -> list[dict[str, str]]:
    """The problem as chat messages that end with a user message; a plain text is one user message.

    Raises:
        ValueError: it has another form, or `template` is `plain` and it is more than [system and] one user message.
    """
    if not isinstance(value, list):
        return [{"role": "user", "content": _text(value, column)}]
    messages = [_message(message, f"{column}.{index}") for index, message in enumerate(value)]
    if not messages:
        raise ValueError(f"column {column!r} is empty")
    if messages[-1]["role"] != "user":
        raise ValueError(f"column {column!r} ends with a message of the {messages[-1]['role']}, not of the user")
    if template == "plain" and [m["role"] for m in messages] not in (["user"], ["system", "user"]):
        raise ValueError(f"column {column!r} is a conversation, which data.template=plain does not support")
    return messages


def _message(message: Any, column: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise ValueError(f"column {column!r} is not a chat message (a mapping with role and content)")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"column {column!r} has the role {str(role)[:_SHOWN]!a}, expected one of {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(_text(part.get("text"), column) for part in content)
    return {"role": role, "content": _text(content, column) if content != "" or role != "system" else ""}


def read_answer(value: Any, column: str, extract: Callable[[str], str | None] | None, pattern: str | None) -> str:
    """The reference answer as text: numbers as written in the file, several answers joined by commas.

    Raises:
        ValueError: it is empty or has another form, or `extract` (from `pattern`) finds no answer in it.
    """
    answer = ", ".join(_answers(value, column))
    if extract is None:
        return answer
    extracted = (extract(answer) or "").strip()
    if not extracted:
        shown = answer if len(answer) <= _SHOWN else f"...{answer[-_SHOWN:]}"
        raise ValueError(f"data.answer_regex={pattern} finds no answer in column {column!r}: {shown!a}")
    return extracted


def _answers(value: Any, column: str) -> list[str]:
    if isinstance(value, list):
        answers = [answer for part in value for answer in _answers(part, column)]
        if not answers:
            raise ValueError(f"column {column!r} is empty")
        return answers
    if isinstance(value, NoNumber) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"column {column!r} holds {value}, which is not a number")
    if isinstance(value, (IntText, FloatText)):
        return [str(value)]
    if isinstance(value, float):  # tables do not keep the text of numbers: 72.0 may have been 72
        return [str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)]
    if isinstance(value, (int, Decimal)) and not isinstance(value, bool):
        return [f"{value}"]
    text = _text(value, column)
    return [answer for part in _texts_in_json(text) for answer in _answers(part, column)] or [text]


def _texts_in_json(text: str) -> list[str]:
    """The items of a list of strings stored as text, such as `["1/2", "0.5"]`; [] for any other text, also [1, 2]."""
    if not (text.lstrip().startswith('["') and text.rstrip().endswith('"]')):
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return value if all(isinstance(part, str) for part in value) else []


def _text(value: Any, column: str) -> str:
    if value is None:
        raise ValueError(f"column {column!r} is missing")
    if not isinstance(value, str) or isinstance(value, (IntText, FloatText, NoNumber)):
        kind = {IntText: "int", FloatText: "float", NoNumber: "float"}.get(type(value), type(value).__name__)
        raise ValueError(f"column {column!r} holds {kind}, not text")
    if not value.strip():
        raise ValueError(f"column {column!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"column {column!r} holds {value[error.start]!a}, an unpaired surrogate, at {error.start}"
        ) from None
    return value


def answer_extractor(config: DataConfig) -> Callable[[str], str | None] | None:
    """The function of `data.answer_regex` that extracts the answer from the answer column's text; None if not set."""
    pattern = config.answer_regex
    if pattern is None:
        return None
    if pattern in PRESETS:
        return PRESETS[pattern]
    compiled = regex.compile(pattern)  # `re` has no time limit
    return lambda text: _last_match(compiled, text)


def _last_match(compiled: regex.Pattern, text: str) -> str | None:
    match = None
    try:
        for match in compiled.finditer(text, timeout=MATCH_SECONDS):  # noqa: B007
            pass
    except TimeoutError:
        raise DataError(
            f"data.answer_regex={compiled.pattern} takes more than {MATCH_SECONDS:g} s for {text[:_SHOWN]!a}: rewrite "
            "it without nested repetitions such as (a+)+"
        ) from None
    return None if match is None else match[compiled.groups]


def _gsm8k(text: str) -> str | None:
    """The text after the last ####, without thousands separators."""
    mark = text.rpartition("####")
    return _THOUSANDS.sub("", mark[2].strip()) if mark[1] else None


def _last_number(text: str) -> str | None:
    numbers = re.findall(_NUMBER, text)
    return _THOUSANDS.sub("", numbers[-1].rstrip(",")) if numbers else None


PRESETS: dict[str, Callable[[str], str | None]] = {"gsm8k": _gsm8k, "boxed": last_boxed, "last_number": _last_number}
"""Named values of `data.answer_regex`."""


def pack_messages(messages: list[dict[str, str]]) -> tuple[str, bool]:
    """Serialize a problem to one text; the flag is true if it is JSON of several messages."""
    if len(messages) == 1:
        return messages[0]["content"], False
    return json.dumps(messages, ensure_ascii=False), True


def unpack_messages(text: str, several: bool) -> list[dict[str, str]]:
    """Inverse of `pack_messages`."""
    return json.loads(text) if several else [{"role": "user", "content": text}]


LONGEST_INTEGER = 1000
"""Maximum digits of an integer in a column for reward functions; longer ones stay text."""


def pack_columns(columns: Mapping[str, Any]) -> str:
    """Serialize columns for reward functions to JSON; values without a JSON type (a date) become text."""
    if not columns:
        return ""
    return json.dumps({name: _with_numbers(value) for name, value in columns.items()}, default=str)


def unpack_columns(text: str) -> dict[str, Any]:
    """Inverse of `pack_columns`."""
    return json.loads(text) if text else {}


def _with_numbers(value: Any) -> Any:
    """Convert number texts in a value back to numbers."""
    if isinstance(value, IntText):
        return int(value) if len(value) <= LONGEST_INTEGER else str(value)
    if isinstance(value, (FloatText, NoNumber)):
        return float(value)
    if isinstance(value, Mapping):
        return {str(name): _with_numbers(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_numbers(inner) for inner in value]
    return value
