"""Turns what `reward.function` names into one callable contract: found, set up, its parameters listed, results read.

It may be a function or a class (constructed once in every worker, its instances callable), for one response or for a
batch, async or not; `binding.py` decides what each parameter gets. It runs in the reward workers, which import neither
torch nor numpy for it: scalars of both are recognized by their shape and `item`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any

_KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: "positional",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "either",
    inspect.Parameter.KEYWORD_ONLY: "keyword",
    inspect.Parameter.VAR_POSITIONAL: "args",
    inspect.Parameter.VAR_KEYWORD: "kwargs",
}
_REWARD_KEYS, _CORRECT_KEYS = ("reward", "score"), ("correct", "acc")
"""Keys of a result that is a mapping."""


class ContractError(Exception):
    """What is wrong with a reward function, its arguments or its result, in a sentence."""


@dataclass(frozen=True)
class RewardFunction:
    """A loaded reward function."""

    call: Callable[..., Any]
    parameters: list[tuple[str, str, bool]]
    """Name, kind (`positional`, `either`, `keyword`, `args`, `kwargs`) and whether it must be given, of each parameter
    that `reward.arguments` has not set."""
    is_async: bool
    close: Callable[[], object] | None = None
    """Called when the pool is closed; None: there is nothing to close."""


def load_function(path: str, arguments: Mapping[str, Any], deadline_s: float) -> RewardFunction:
    """Import `package.module:name`; a class is constructed.

    Args:
        path: where it is.
        arguments: keywords of the function, or of the class's constructor.
        deadline_s: seconds that a call may take; a class whose constructor has a parameter of this name gets it.

    Raises:
        ContractError: it does not exist, is not callable, or does not take the arguments.
    """
    module_name, _, name = path.partition(":")
    module = importlib.import_module(module_name)
    try:
        found = getattr(module, name)
    except AttributeError:
        raise ContractError(f"module {module_name} ({module.__file__}) has no function {name}") from None
    if not callable(found):
        raise ContractError(f"{name} in {module_name} is a {type(found).__name__}, not a function")
    if inspect.isclass(found):
        names = [parameter[0] for parameter in parameters_of(found)]
        settings = {"deadline_s": deadline_s, **arguments} if "deadline_s" in names else dict(arguments)
        _check_arguments(found, settings, name)
        found, arguments = found(**settings), {}
        if not callable(found):
            raise ContractError(f"{name} in {module_name} is a class whose instances cannot be called: add __call__")
    parameters = parameters_of(found)
    if arguments:
        _check_arguments(found, arguments, name, partial_call=True)
        parameters = [parameter for parameter in parameters if parameter[0] not in arguments]
    close = getattr(found, "close", None)
    return RewardFunction(
        call=partial(found, **arguments) if arguments else found,
        parameters=parameters,
        is_async=inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(getattr(found, "__call__", None)),  # noqa: B004
        close=close if callable(close) else None,
    )


def parameters_of(found: Callable[..., Any]) -> list[tuple[str, str, bool]]:
    """Name, kind and whether it must be given, of each parameter of a callable."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # written in C: it takes what reward functions always took
        return [("arguments", "args", False)]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        (p.name, _KINDS[p.kind], p.default is inspect.Parameter.empty and p.kind not in variable)
        for p in signature.parameters.values()
    ]


def _check_arguments(found: Callable[..., Any], arguments: Mapping[str, Any], name: str, partial_call=False) -> None:
    """Refuse `reward.arguments` that the function or constructor does not take."""
    signature = inspect.signature(found)
    try:
        signature.bind_partial(**arguments) if partial_call else signature.bind(**arguments)
    except TypeError as error:
        raise ContractError(f"reward.arguments do not fit {name}{signature}: {error}") from None


def read_result(value: Any, bounded: bool = True) -> tuple[float, bool | None]:
    """Reward and correctness that a function returned for one response.

    Args:
        value: a number of any type, a pair (reward, correct), or a mapping with `reward` (or `score`) and perhaps
            `correct` (or `acc`). Numbers may be scalars of numpy and torch, `Fraction` and `Decimal`.
        bounded: whether the reward has to be in [-1, 1]; else it has to be finite.

    Returns:
        The reward, and whether the response is correct (None: the function does not say).

    Raises:
        ContractError: it is something else; says what.
    """
    try:
        shown = f"{value!r:.200}"
        reward, correct = _taken_apart(value, shown)
        number = _number(reward)
    except ContractError:
        raise
    except Exception as error:  # code of the user's, too
        detail = f"{type(error).__name__}: {error}"
        raise ContractError(f"what it returned cannot be read as a number: {detail}") from error
    if not math.isfinite(number) or (bounded and not -1.0 <= number <= 1.0):
        wanted = "a number in [-1, 1]" if bounded else "a finite number"
        raise ContractError(f"it returned {shown}; a reward is {wanted}")
    return number, correct


def _taken_apart(value: Any, shown: str) -> tuple[Any, bool | None]:
    correct = None
    if isinstance(value, Mapping):
        key = next((key for key in _REWARD_KEYS if key in value), None)
        if key is None:
            raise ContractError(f"it returned {shown}, a mapping without the key {' or '.join(_REWARD_KEYS)}")
        correct = next((value[name] for name in _CORRECT_KEYS if name in value), None)
        value = value[key]
    elif isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ContractError(f"it returned {shown}; a reward is a number, or a pair (reward, correct)")
        value, correct = value
    if correct is not None and _number(correct) not in (0.0, 1.0):
        raise ContractError(f"it returned {shown}; whether a response is correct is true or false")
    return value, None if correct is None else bool(_number(correct))


def _number(value: Any) -> float:
    """A scalar of any kind as a float; NaN for what is none."""
    if isinstance(value, (numbers.Real, Decimal)):
        return float(value)
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return _number(value.item())
    return math.nan


def split_batch(value: Any, count: int) -> list[Any]:
    """The results that a batch function returned, one for each response.

    Args:
        value: a list, tuple, array or tensor with a result for each response, or a tuple of two lists (or arrays):
            all rewards, and whether each response is correct.
        count: responses of the call.

    Raises:
        ContractError: it is something else, or has another length.
    """
    if isinstance(value, tuple) and len(value) == 2 and all(_is_column(part) for part in value):
        rewards, correct = (split_batch(part, count) for part in value)
        return list(zip(rewards, correct, strict=True))
    if not _is_column(value) and not isinstance(value, tuple):
        raise ContractError(
            f"it returned a {type(value).__name__} for a batch of {count} responses; a batch function (one with a "
            "parameter such as responses or completions) returns a list with a result for each"
        )
    if len(value) != count:
        raise ContractError(f"it returned {len(value)} results for a batch of {count} responses")
    return list(value)


def _is_column(value: Any) -> bool:
    return isinstance(value, list) or len(getattr(value, "shape", ())) > 0
