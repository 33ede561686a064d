"""The keys of a settings model as a flat list: path, type, default and documentation of each.

Reading, error messages and the generated reference use this list, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_g2rl.config.sections.base import LARGEST
from megatron_g2rl.config.tree import Config
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
    """One key."""

    path: str
    """Dotted name, as on the command line (`algorithm.kl_coefficient`)."""
    allowed: str
    """Allowed values, in words (`integer > 0`)."""
    default: Any
    """Default value; undefined if `required`."""
    required: bool
    """Whether it must be set because it has no default."""
    description: str
    """Its documentation in the model."""
    scalars: tuple[type, ...]
    """Accepted types of a YAML value (for a list or a mapping: that type)."""
    nullable: bool
    """Whether null is allowed."""

    @property
    def is_text(self) -> bool:
        """Whether its value is text, so that `run.name=7` means the text 7."""
        return str in self.scalars

    @property
    def leaf(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Group:
    """One section of a model."""

    name: str
    """Its key in a YAML file."""
    description: str
    """Its documentation in the model."""
    optional: bool
    """Whether the section may be null."""
    keys: tuple[Key, ...]
    """Its keys, in order."""


@cache
def groups_of(model: type[BaseModel]) -> tuple[Group, ...]:
    """All sections of a model, in order."""
    return tuple(
        Group(name, section.__doc__ or "", NoneType in get_args(field.annotation), tuple(_keys(section, f"{name}.")))
        for name, field in model.model_fields.items()
        if (section := section_of(field.annotation)) is not None
    )


@cache
def keys_of(model: type[BaseModel]) -> dict[str, Key]:
    """All keys of a model, those of its sections included, by dotted path, in order."""
    return {key.path: key for key in _keys(model, "")}


def config_groups() -> tuple[Group, ...]:
    """All sections of `Config`, in order."""
    return groups_of(Config)


def config_keys() -> dict[str, Key]:
    """All keys of `Config` by dotted path, in order."""
    return keys_of(Config)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class among the types of an annotation; None if there is none."""
    return next((kind for kind in kinds_of(annotation) if _is_section(kind)), None)


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The types of which an annotation is the union, without None and without their validators."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(getattr(member, "__origin__", member) if _is_annotated(member) else member for member in members)


def child_annotation(annotation: Any, name: str | int) -> Any:
    """The type of the value at a name (of a section or mapping) or at a position (of a list); None if there is none."""
    for kind in kinds_of(annotation):
        if _is_section(kind):
            return kind.model_fields[name].annotation if name in kind.model_fields else None
        if get_origin(kind) in (tuple, dict):
            return get_args(kind)[get_origin(kind) is dict]
    return None


def is_text(annotation: Any) -> bool:
    """Whether a value of this type is text: a string, a path or one of several words."""
    return any(kind in (str, Path) or get_origin(kind) is Literal for kind in kinds_of(annotation))


def nearest_names(name: str, known: Sequence[str]) -> list[str]:
    """Dotted names nearest to an unknown one: those with the same last part, else the most similar one."""
    leaf = name.rpartition(".")[2]
    same_leaf = [path for path in known if path.rpartition(".")[2] == leaf]
    return same_leaf or [max(known, key=lambda path: _similarity(name, path))]


def _similarity(name: str, path: str) -> float:
    full = SequenceMatcher(None, name, path).ratio()
    leaves = SequenceMatcher(None, name.rpartition(".")[2], path.rpartition(".")[2]).ratio()
    return max(full, 0.95 * leaves)  # prefer a similar key in the same section


def _keys(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            yield _key(f"{prefix}{name}", field)
        else:
            yield from _keys(section, f"{prefix}{name}.")


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_annotated(member: Any) -> bool:
    return hasattr(member, "__metadata__")


def _key(path: str, field: FieldInfo) -> Key:
    kind = kinds_of(field.annotation)[0]
    if get_origin(kind) is Literal:
        allowed, scalars = "one of " + ", ".join(get_args(kind)), (str,)
    elif registry := _registry(field):
        allowed, scalars = registry.allowed, (str,)
    else:
        word, scalars = _KINDS[get_origin(kind) or kind]
        bounds = _bounds(field)
        allowed = " ".join([word, *[bounds] * bool(bounds)])
    nullable = NoneType in get_args(field.annotation)
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


def _bounds(field: FieldInfo) -> str:
    """The bounds of a value in words; an Annotated member of a union has its own."""
    metadata = list(field.metadata)
    for member in get_args(field.annotation) if get_origin(field.annotation) in (Union, UnionType) else ():
        if _is_annotated(member):
            metadata += [part for info in member.__metadata__ for part in getattr(info, "metadata", ())]
    bounds = [(sign, getattr(part, name)) for part in metadata for name, sign in _BOUNDS if hasattr(part, name)]
    # The upper limit of every integer is not worth showing.
    words = [f"{sign} {value}" for sign, value in bounds if value != LARGEST]
    words += [f"matching {part.pattern}" for part in metadata if getattr(part, "pattern", None)]
    return " and ".join(words)
