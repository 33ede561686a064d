"""Loads the function named by `reward.function`, lists its parameters, and reads its results.

It may be a function or a class (constructed once per worker, with callable instances), for one response or a batch,
sync or async; `binding.py` binds its parameters. This module runs in the reward workers and imports neither torch nor
numpy: their scalars are recognized by `shape` and `item`.
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
"""Accepted keys if the result is a mapping."""
_FORM_KEY = "form"


class ContractError(Exception):
    """A reward function, its arguments or its result are invalid; the message is one sentence."""


@dataclass(frozen=True)
class RewardFunction:
    """A loaded reward function."""

    call: Callable[..., Any]
    parameters: list[tuple[str, str, bool]]
    """Name, kind (`positional`, `either`, `keyword`, `args`, `kwargs`) and whether it is required, of each parameter
    not set by `reward.arguments`."""
    is_async: bool
    close: Callable[[], object] | None = None
    """Called when the pool is closed; None if there is nothing to close."""


def load_function(path: str, arguments: Mapping[str, Any], deadline_s: float) -> RewardFunction:
    """Import `package.module:name` and construct it if it is a class.

    Args:
        path: import path, `package.module:name`.
        arguments: keyword arguments of the function, or of the class's constructor.
        deadline_s: seconds per call; passed to a class whose constructor has a parameter of this name.

    Raises:
        ContractError: it does not exist, is not callable, or does not accept the arguments.
    """
    module_name, _, name = path.partition(":")
    module = importlib.import_module(module_name)
    try:
        function = getattr(module, name)
    except AttributeError:
        raise ContractError(f"module {module_name} ({module.__file__}) has no function {name}") from None
    if not callable(function):
        raise ContractError(f"{name} in {module_name} is a {type(function).__name__}, not a function")
    if inspect.isclass(function):
        names = [parameter[0] for parameter in parameters_of(function)]
        settings = {"deadline_s": deadline_s, **arguments} if "deadline_s" in names else dict(arguments)
        _check_arguments(function, settings, name)
        function, arguments = function(**settings), {}
        if not callable(function):
            raise ContractError(f"{name} in {module_name} is a class whose instances are not callable: add __call__")
    parameters = parameters_of(function)
    if arguments:
        _check_arguments(function, arguments, name, partial_call=True)
        parameters = [parameter for parameter in parameters if parameter[0] not in arguments]
    close = getattr(function, "close", None)
    return RewardFunction(
        call=partial(function, **arguments) if arguments else function,
        parameters=parameters,
        is_async=any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None)))),  # noqa: B004
        close=close if callable(close) else None,
    )


def parameters_of(function: Callable[..., Any]) -> list[tuple[str, str, bool]]:
    """Name, kind and whether it is required, of each parameter of a callable."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # no signature (written in C): assume response and answer
        return [("arguments", "args", False)]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        (p.name, _KINDS[p.kind], p.default is inspect.Parameter.empty and p.kind not in variable)
        for p in signature.parameters.values()
    ]


def _check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], name: str, partial_call=False) -> None:
    """Refuse `reward.arguments` that the function or constructor does not accept."""
    signature = inspect.signature(function)
    try:
        signature.bind_partial(**arguments) if partial_call else signature.bind(**arguments)
    except TypeError as error:
        raise ContractError(f"reward.arguments do not fit {name}{signature}: {error}") from None


def read_result(value: Any, bounded: bool = True) -> tuple[float, bool | None]:
    """Parse the result of a function for one response.

    Args:
        value: a number of any type, a pair (reward, correct), or a mapping with `reward` (or `score`) and optionally
            `correct` (or `acc`). Numbers may be numpy or torch scalars, `Fraction` or `Decimal`.
        bounded: whether the reward must be in [-1, 1]; otherwise it must be finite.

    Returns:
        The reward, and whether the response is correct (None if the result does not include it).

    Raises:
        ContractError: the value has another form; the message shows it.
    """
    try:
        shown = f"{value!r:.200}"
        reward, correct = _split_result(value, shown)
        number = _number(reward)
    except ContractError:
        raise
    except Exception as error:  # includes errors from user code
        reason = f"{type(error).__name__}: {error}"
        raise ContractError(f"its result cannot be read as a number: {reason}") from error
    if not math.isfinite(number) or (bounded and not -1.0 <= number <= 1.0):
        expected = "a number in [-1, 1]" if bounded else "a finite number"
        raise ContractError(f"it returned {shown}; a reward must be {expected}")
    return number, correct


def read_form(value: Any) -> str | None:
    """The canonical form in the result of a function for one response.

    Returns:
        None if the result is not a mapping with `form`; "" if its form is None, as for incorrect responses.

    Raises:
        ContractError: the form is not a text.
    """
    if not isinstance(value, Mapping) or _FORM_KEY not in value:
        return None
    form = value[_FORM_KEY]
    if form is not None and not isinstance(form, str):
        raise ContractError(f"it returned {value!r:.200}; the form of a response is a text, or None without one")
    return form or ""


def _split_result(value: Any, shown: str) -> tuple[Any, bool | None]:
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
    """Convert a scalar of any kind to float; NaN if it is not a scalar."""
    if isinstance(value, (numbers.Real, Decimal)):
        return float(value)
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return _number(value.item())
    return math.nan


def split_batch(value: Any, count: int) -> list[Any]:
    """Split the return value of a batch function into one result per response.

    Args:
        value: a list, tuple, array or tensor with one result per response, or a tuple of two lists (or arrays): the
            rewards, and whether each response is correct.
        count: number of responses of the call.

    Raises:
        ContractError: the value has another form or length.
    """
    if isinstance(value, tuple) and len(value) == 2 and all(_is_column(part) for part in value):
        rewards, correct = (split_batch(part, count) for part in value)
        return list(zip(rewards, correct, strict=True))
    if not _is_column(value) and not isinstance(value, tuple):
        raise ContractError(
            f"it returned a {type(value).__name__} for a batch of {count} responses; a batch function (one with a "
            "parameter such as responses or completions) must return a list with one result per response"
        )
    if len(value) != count:
        raise ContractError(f"it returned {len(value)} results for a batch of {count} responses")
    return list(value)


def _is_column(value: Any) -> bool:
    return isinstance(value, list) or len(getattr(value, "shape", ())) > 0
