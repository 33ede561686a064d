"""The base of all sections, and the types of their values. Values that are invalid on their own are rejected here."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from megatron_g2rl.registry import BASELINES, ENGINES, FAMILIES, MAPPINGS, METHODS, TASKS

LARGEST = 2**32 - 1
"""Upper limit of all counts and seeds."""
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
CallSeconds = Annotated[float, Field(gt=0, le=1_000_000)]
"""Seconds, within the range of an operating-system timer."""
Fraction = Annotated[float, Field(gt=0, le=1)]
Duration = Annotated[str, Field(pattern=r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?$", min_length=2)]
"""A duration such as 3h50m, 2d12h or 90s; parsed by `stopping.seconds_of`."""


def _usable_path(path: str | Path) -> str | Path:
    text = str(path)
    if "\0" in text:
        raise ValueError("contains a zero byte, which is not allowed in a path")
    if len(os.fsencode(text)) > 4_000 or any(len(os.fsencode(part)) > 255 for part in text.split("/")):
        raise ValueError("is longer than a path can be")
    try:
        Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"cannot be expanded: {error}") from None
    return path


FilePath = Annotated[Path, AfterValidator(_usable_path)]
Name = Annotated[str, AfterValidator(_usable_path)]
"""A folder, a file, a Hugging Face Hub name, or a built-in name of this package."""


def _usable_pattern(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"is not a valid regular expression: {error}") from None
    if groups > 1:
        raise ValueError(f"has {groups} groups; only one can capture the answer, write the others as (?:...)")
    return pattern


def comma_separated(value: object) -> object:
    """A list that may be written as one text, as on the command line."""
    if isinstance(value, str):
        value = [name for part in value.split(",") if (name := part.strip())]
    return tuple(value) if isinstance(value, list) else value


AnswerPattern = Annotated[str, AfterValidator(_usable_pattern)]
"""A preset of `data.answer_regex` or a regular expression; the preset names are valid expressions themselves."""


Metric = Annotated[str, Field(pattern=r"^(pass|maj|mean)@[1-9]\d{0,8}$")]
"""A metric of an evaluation, such as `pass@16`."""

# A registered name or the import path of the user's own code (docs/extending.md); `keys.py` reads the registry.
MappingName = Annotated[str, AfterValidator(MAPPINGS.check), MAPPINGS]
MethodName = Annotated[str, AfterValidator(METHODS.check), METHODS]
BaselineName = Annotated[str, AfterValidator(BASELINES.check), BASELINES]
EngineName = Annotated[str, AfterValidator(ENGINES.check), ENGINES]
FamilyName = Annotated[str, AfterValidator(FAMILIES.check), FAMILIES]
TaskName = Literal[*TASKS]
"""A built-in task: only registered ones, because `builtin:NAME` is also a source of data."""


def _known_tasks(names: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"names {', '.join(map(repr, unknown))}; the built-in tasks are {', '.join(TASKS)}")
    return names


TaskNames = Annotated[tuple[str, ...], BeforeValidator(comma_separated), AfterValidator(_known_tasks)]
"""Several built-in tasks."""

FunctionPath = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
"""`package.module:name`."""
Arguments = dict[str, bool | int | float | str | None]


class Section(BaseModel):
    """A frozen section of settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
