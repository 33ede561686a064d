"""Binds the parameters of a reward function to values, once, before the run starts.

Parameters are bound by name: the known names are those of this package and of reward functions for TRL, verl and
NeMo-RL, so that those run unchanged. Any other name is a column of the data. A function of two parameters with unknown
names gets the response and the reference answer, in this order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ALL_COLUMNS = "*"
"""In a collection of column names: all columns of the data."""
FIELDS = {
    "response": ("response", "response_text", "completion", "solution_str", "text"),
    "answer": ("answer", "ground_truth"),
    "prompt": ("prompt",),
    "tokens": ("tokens",),
    "finish_reason": ("finish_reason",),
    "columns": ("columns",),
}
"""Value that a per-response function can take -> parameter names that it is bound to."""
BATCH_FIELDS = {
    "response": ("responses", "completions", "solution_strs", "texts"),
    "answer": ("answers", "ground_truths"),
    "prompt": ("prompts",),
    "tokens": ("completion_ids",),
    "finish_reason": ("finish_reasons",),
}
"""The same for a batch: a parameter with one of these names makes it a batch function, whose arguments are lists."""
_FIELD_OF = {name: field for field, names in FIELDS.items() for name in names}
_BATCH_FIELD_OF = {name: field for field, names in BATCH_FIELDS.items() for name in names}
_SHOW_TRUNCATION = {"finish_reason", "tokens"}
"""A function that takes one of these can itself detect that a response is truncated."""


class BindingError(Exception):
    """A parameter cannot be bound; the message lists the known names."""


class Sample(NamedTuple):
    """A response with everything that a reward function can take."""

    response: str
    answer: str
    """The reference answer."""
    prompt: str = ""
    """The rendered prompt, chat template included."""
    tokens: Sequence[int] = ()
    """Token ids of the response, including the one that ends it."""
    finish_reason: str = "stop"
    """`stop` or `length`."""
    columns: Mapping[str, Any] = {}
    """Other columns of the row."""
    complete: bool = True
    """If False, functions that cannot detect truncation get an empty response instead."""


@dataclass(frozen=True)
class Binding:
    """Sources of a reward function's arguments: fields of `Sample`, or `columns.NAME`."""

    is_batch: bool = False
    positional: tuple[str, ...] = ()
    keywords: dict[str, str] = field(default_factory=dict)
    """Parameter -> source."""
    others: bool = False
    """Whether `**kwargs` takes the columns that are not bound to a parameter."""
    already_set: frozenset[str] = frozenset()
    """Parameters set by `reward.arguments`, which `**kwargs` must not set again."""
    optional: frozenset[str] = frozenset()
    """Parameters with a default, which applies if a row lacks their column."""

    @property
    def needed_columns(self) -> set[str]:
        """Columns that the data must have."""
        sources = [*self.positional, *(source for name, source in self.keywords.items() if name not in self.optional)]
        return {source.partition(".")[2] for source in sources if source.startswith("columns.")}

    @property
    def sees_truncated(self) -> bool:
        """Whether the function gets the text of incomplete responses."""
        return bool(_SHOW_TRUNCATION & {*self.positional, *self.keywords.values()})

    def arguments(self, sample: Sample) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments for one response."""
        if not sample.complete and not self.sees_truncated:
            sample = sample._replace(response="", tokens=())
        keywords = {
            name: _value(source, sample)
            for name, source in self.keywords.items()
            if not (name in self.optional and _is_missing(source, sample))
        }
        if self.others:
            taken = self.already_set | _FIELD_OF.keys() | _BATCH_FIELD_OF.keys()
            keywords = {name: value for name, value in sample.columns.items() if name not in taken} | keywords
        return [_value(source, sample) for source in self.positional], keywords

    def batch_arguments(self, samples: Sequence[Sample]) -> tuple[list[list[Any]], dict[str, list[Any]]]:
        """Arguments for a batch: each is a list, with None where a row lacks the value."""
        each = [self.arguments(sample) for sample in samples]
        names = dict.fromkeys(name for _, keywords in each for name in keywords)
        return (
            [list(values) for values in zip(*(positional for positional, _ in each), strict=True)],
            {name: [keywords.get(name) for _, keywords in each] for name in names},
        )


def _is_missing(source: str, sample: Sample) -> bool:
    return source.startswith("columns.") and source.partition(".")[2] not in sample.columns


def _value(source: str, sample: Sample) -> Any:
    name, _, column = source.partition(".")
    if column:
        return sample.columns.get(column)
    value = getattr(sample, name)
    return list(value) if name == "tokens" else value


Parameters = Sequence[tuple[str, str, bool]]
"""Name, kind and whether it is required, as in `contract.RewardFunction`."""


def possible_columns(parameters: Parameters) -> set[str]:
    """Columns that a function may take: its parameters with unknown names, or `ALL_COLUMNS`."""
    fields = _fields(parameters)[0]
    kinds = {kind for _, kind, _ in parameters}
    if "columns" in fields.values() or ("kwargs" in kinds and "args" not in kinds):
        return {ALL_COLUMNS}
    return {name for name, kind, _ in parameters if kind not in ("args", "kwargs") and name not in fields}


def bind(parameters: Parameters, columns: Collection[str] = (), already_set: frozenset[str] = frozenset()) -> Binding:
    """Bind each parameter to its source.

    Args:
        parameters: parameters of the function.
        columns: columns of the data.
        already_set: names in `reward.arguments`.

    Raises:
        BindingError: a required parameter is neither a known name nor a column.
    """
    fields, is_batch = _fields(parameters)
    kinds = {kind for _, kind, _ in parameters}
    named = [(name, kind, required) for name, kind, required in parameters if kind not in ("args", "kwargs")]
    required = [(name, kind) for name, kind, needed in named if needed]
    sources = fields | {name: f"columns.{name}" for name, _, _ in named if name not in fields and name in columns}
    if "args" in kinds and not required:
        return Binding(is_batch, ("response", "answer"))
    if _are_response_and_answer([name for name, _ in required], sources) and "keyword" not in dict(required).values():
        sources |= zip((name for name, _ in required), ("response", "answer"), strict=True)
    unknown = [name for name, _ in required if name not in sources]
    if unknown or not named:
        raise BindingError(_refusal(unknown, is_batch, columns))
    leading = []
    for name, kind, _ in named:
        if kind != "positional" or name not in sources:
            break
        leading.append(name)
    keywords = {name: sources[name] for name, kind, _ in named if kind != "positional" and name in sources}
    return Binding(
        is_batch,
        tuple(sources[name] for name in leading),
        keywords,
        "kwargs" in kinds,
        already_set,
        optional=frozenset(name for name, _, needed in named if not needed),
    )


def _fields(parameters: Parameters) -> tuple[dict[str, str], bool]:
    """Map parameters with a known name to their field, and whether the function takes batches."""
    names = [name for name, kind, _ in parameters if kind not in ("args", "kwargs")]
    is_batch = any(name in _BATCH_FIELD_OF for name in names)
    known = _FIELD_OF | _BATCH_FIELD_OF if is_batch else _FIELD_OF
    return {name: known[name] for name in names if name in known}, is_batch


def _are_response_and_answer(required: Sequence[str], sources: Mapping[str, str]) -> bool:
    """Whether two required parameters, at least one with an unknown name, are response and answer by position."""
    if len(required) != 2 or all(name in sources for name in required):
        return False
    first, second = (sources.get(name) for name in required)
    return first in (None, "response") and second in (None, "answer")


def _refusal(unknown: Sequence[str], is_batch: bool, columns: Collection[str]) -> str:
    known = ", ".join(names[0] for names in (FIELDS | BATCH_FIELDS if is_batch else FIELDS).values())
    data_columns = f"columns of the data ({', '.join(sorted(columns))})" if columns else "columns of the data"
    if not unknown:
        return f"it takes no argument; it can take {known}, and {data_columns}"
    which = "the parameter " if len(unknown) == 1 else "the parameters "
    return f"{which}{', '.join(unknown)} cannot be filled; a reward function can take {known}, and {data_columns}"
