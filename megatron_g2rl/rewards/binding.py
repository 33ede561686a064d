"""Which value each parameter of a reward function gets, decided once, before the run starts.

A parameter is known by its name: the names here are those of this package and of the reward functions of TRL, verl and
NeMo-RL, so that those run as they are. Any other name is a column of the data. A function of two parameters that mean
nothing gets the response and the reference answer, in this order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ALL_COLUMNS = "*"
"""Stands for every column of the data, in a collection of names."""
FIELDS = {
    "response": ("response", "response_text", "completion", "solution_str", "text"),
    "answer": ("answer", "ground_truth"),
    "prompt": ("prompt",),
    "tokens": ("tokens",),
    "finish_reason": ("finish_reason",),
    "columns": ("columns",),
}
"""What a function for one response can take -> names of the parameter."""
BATCH_FIELDS = {
    "response": ("responses", "completions", "solution_strs", "texts"),
    "answer": ("answers", "ground_truths"),
    "prompt": ("prompts",),
    "tokens": ("completion_ids",),
    "finish_reason": ("finish_reasons",),
}
"""The same for a batch: a parameter of one of these names makes it a batch function, whose parameters are all lists."""
_FIELD_OF = {name: field for field, names in FIELDS.items() for name in names}
_BATCH_FIELD_OF = {name: field for field, names in BATCH_FIELDS.items() for name in names}
_SHOW_TRUNCATION = {"finish_reason", "tokens"}
"""A function that takes one of these can tell by itself that a response is truncated."""


class BindingError(Exception):
    """A parameter means nothing here; the sentence says which do."""


class Sample(NamedTuple):
    """A response with what a reward function may want to know of it."""

    response: str
    answer: str
    """The reference answer."""
    prompt: str = ""
    """The prompt as the model saw it, template included."""
    tokens: Sequence[int] = ()
    """Token ids of the response, with the one that ends it."""
    finish_reason: str = "stop"
    """`stop` or `length`."""
    columns: Mapping[str, Any] = {}
    """Other columns of the row."""
    complete: bool = True
    """Whether functions that cannot tell see the response; else they see an empty one."""


@dataclass(frozen=True)
class Binding:
    """Where the arguments of a reward function come from: fields of `Sample`, or `columns.NAME`."""

    is_batch: bool = False
    positional: tuple[str, ...] = ()
    keywords: dict[str, str] = field(default_factory=dict)
    """Parameter -> source."""
    others: bool = False
    """Whether `**kwargs` takes the columns that no parameter is called after."""
    already_set: frozenset[str] = frozenset()
    """Parameters that `reward.arguments` has set: `**kwargs` must not set them again."""
    optional: frozenset[str] = frozenset()
    """Parameters with a default, which they keep where a row lacks their column."""

    @property
    def needed_columns(self) -> set[str]:
        """Columns that must be there."""
        sources = [*self.positional, *(source for name, source in self.keywords.items() if name not in self.optional)]
        return {source.partition(".")[2] for source in sources if source.startswith("columns.")}

    @property
    def sees_truncated(self) -> bool:
        """Whether it gets the text of an incomplete response."""
        return bool(_SHOW_TRUNCATION & {*self.positional, *self.keywords.values()})

    def arguments(self, sample: Sample) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of one response."""
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
        """The same for a batch: each argument is a list; None stands for what a row lacks."""
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
"""Name, kind and whether it must be given, as in `contract.RewardFunction`."""


def possible_columns(parameters: Parameters) -> set[str]:
    """Columns that a function may take: the names that nothing else has, or all of them."""
    fields = _fields(parameters)[0]
    kinds = {kind for _, kind, _ in parameters}
    if "columns" in fields.values() or ("kwargs" in kinds and "args" not in kinds):
        return {ALL_COLUMNS}
    return {name for name, kind, _ in parameters if kind not in ("args", "kwargs") and name not in fields}


def bind(parameters: Parameters, columns: Collection[str] = (), already_set: frozenset[str] = frozenset()) -> Binding:
    """Decide what each parameter gets.

    Args:
        parameters: of the function.
        columns: of the data.
        already_set: names in `reward.arguments`.

    Raises:
        BindingError: a parameter that must be given is neither a known name nor a column.
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
    """Parameters with a known name -> what it means, and whether the function is one for batches."""
    names = [name for name, kind, _ in parameters if kind not in ("args", "kwargs")]
    is_batch = any(name in _BATCH_FIELD_OF for name in names)
    known = _FIELD_OF | _BATCH_FIELD_OF if is_batch else _FIELD_OF
    return {name: known[name] for name in names if name in known}, is_batch


def _are_response_and_answer(required: Sequence[str], sources: Mapping[str, str]) -> bool:
    """Whether two names, of which at least one means nothing, stand for the response and the answer."""
    if len(required) != 2 or all(name in sources for name in required):
        return False
    first, second = (sources.get(name) for name in required)
    return first in (None, "response") and second in (None, "answer")


def _refusal(unknown: Sequence[str], is_batch: bool, columns: Collection[str]) -> str:
    known = ", ".join(names[0] for names in (FIELDS | BATCH_FIELDS if is_batch else FIELDS).values())
    there = f"columns of the data ({', '.join(sorted(columns))})" if columns else "columns of the data"
    if not unknown:
        return f"it takes no argument; it can take {known}, and {there}"
    which = "the parameter " if len(unknown) == 1 else "the parameters "
    return f"{which}{', '.join(unknown)} cannot be filled; a reward function can take {known}, and {there}"
