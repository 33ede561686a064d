"""All configuration keys as a flat list: path, type, default and documentation of each.

Loading, error messages and the generated reference use this list, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_g2rl.config.tree import LARGEST, Config
from megatron_g2rl.registry import Registry

_BOUNDS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
_KINDS: dict[type, tuple[str, tuple[type, ...]]] = {
    bool: ("true or false", (bool,)),
    int: ("integer", (int,)),
    float: ("number", (int, float)),
    str: ("text", (str,)),
    Path: ("path", (str,)),
    tuple: ("list", (list,)),
    dict: ("mapping", (dict,)),
}
"""Display names of the types in the tree, and the YAML types they accept."""


@dataclass(frozen=True)
class Key:
    """One configuration key."""

    path: str
    """Dotted name, as on the command line (`algorithm.kl_coefficient`)."""
    allowed: str
    """Allowed values, in words (`integer > 0`)."""
    default: Any
    """Default value; undefined if `required`."""
    required: bool
    """Whether it must be set because it has no default."""
    description: str
    """Its documentation in the tree."""
    scalars: tuple[type, ...]
    """Accepted types of a YAML value (for a list or a mapping: that type): true is not an integer, "5" not a number."""
    nullable: bool
    """Whether null is allowed."""

    @property
    def is_text(self) -> bool:
        """Whether its value is text, so that `run.name=7` means the text 7."""
        return str in self.scalars

    @property
    def leaf(self) -> str:
        """The part after the dot."""
        return self.path.partition(".")[2]


@dataclass(frozen=True)
class Group:
    """One section of the tree."""

    name: str
    """Its key in a YAML file."""
    description: str
    """Its documentation in the tree."""
    optional: bool
    """Whether the section may be null."""
    keys: tuple[Key, ...]
    """Its keys, in the order of the tree."""


@cache
def config_groups() -> tuple[Group, ...]:
    """All sections of `Config`, in order."""
    return tuple(_group(name, field) for name, field in Config.model_fields.items())


@cache
def config_keys() -> dict[str, Key]:
    """All keys of `Config` by dotted path, in order."""
    return {key.path: key for group in config_groups() for key in group.keys}


def _group(name: str, field: FieldInfo) -> Group:
    members = [member for member in (field.annotation, *get_args(field.annotation)) if _is_section(member)]
    section = members[0]
    keys = tuple(_key(f"{name}.{leaf}", info) for leaf, info in section.model_fields.items())
    return Group(name, section.__doc__ or "", NoneType in get_args(field.annotation), keys)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _key(path: str, field: FieldInfo) -> Key:
    kinds, nullable, bounds = _taken_apart(field.annotation, field.metadata)
    if get_origin(kinds[0]) is Literal:
        allowed, scalars = "one of " + ", ".join(get_args(kinds[0])), (str,)
    elif registry := _registry(field):
        allowed, scalars = registry.allowed, (str,)
    else:
        word, scalars = _KINDS[get_origin(kinds[0]) or kinds[0]]
        allowed = " ".join([word, *[bounds] * bool(bounds)])
    return Key(
        path=path,
        allowed=allowed + " or null" * nullable,
        default=field.default,
        required=field.is_required(),
        description=field.description or "",
        scalars=scalars,
        nullable=nullable,
    )


def _registry(field: FieldInfo) -> Registry | None:
    """The registry whose names a field accepts; inside `X | None` it is in the metadata of X."""
    inside = (info for member in get_args(field.annotation) for info in getattr(member, "__metadata__", ()))
    return next((info for info in (*field.metadata, *inside) if isinstance(info, Registry)), None)


def _taken_apart(annotation: Any, metadata: list[Any]) -> tuple[list[Any], bool, str]:
    """The plain types of an annotation, whether None is one of them, and its bounds in words."""
    kinds, nullable = [], False
    for member in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,):
        if member is NoneType:
            nullable = True
            continue
        if hasattr(member, "__metadata__"):  # Annotated[...] inside a union has its own metadata
            metadata = [*metadata, *(part for info in member.__metadata__ for part in getattr(info, "metadata", ()))]
            member = member.__origin__
        kinds.append(member)
    return kinds, nullable, _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    bounds = [(sign, getattr(part, name)) for part in metadata for name, sign in _BOUNDS if hasattr(part, name)]
    # The upper limit of every integer is not worth showing.
    words = [f"{sign} {value}" for sign, value in bounds if value != LARGEST]
    words += [f"matching {part.pattern}" for part in metadata if getattr(part, "pattern", None)]
    return " and ".join(words)
