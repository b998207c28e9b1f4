"""Values from outside (callers, command lines, files), checked and converted in one place.

A number of any library is a number, a path may begin with ``~``, a text may hold half a character.
Whatever lies behind these functions may trust what they return. All of them raise a `ValueError`
that names the argument, its value and what is wanted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import torch

from .strings import as_path, printable, shown
from .strings import as_text as as_text

LARGEST = 2**63 - 1  # number that torch takes
# What a network may be asked to have: far beyond any that exists, and before memory runs out.
MAX_LAYERS, MAX_WIDTH, MAX_TOKENS = 1000, 2**16, 2**24
PLAIN = (str, bytes, int, float, bool, list, tuple, dict, NoneType)  # short in a message


def plain(value: Any) -> Any:
    """Arrays, tensors and iterables as lists; NumPy's and torch's scalars as Python's."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict)):
        return [plain(item) for item in value]
    return value


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """A whole number in [low, high]; None is no limit. Neither a bool nor 4.0 is one.

    Raises:
        ValueError: anything else.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise ValueError(f"{name} must be a whole number, not {shown(value)}")
    return int(_in_range(name, int(number), low, high))


def real(name: str, value: Any, low: float | None = None, high: float | None = None) -> float:
    """A finite number in [low, high]; None is no limit.

    Raises:
        ValueError: anything else.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise ValueError(f"{name} must be a number, not {shown(value)}")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, not {shown(value)}")
    return float(_in_range(name, number, low, high))


def ratio(name: str, value: Any, most: float = math.inf) -> float:
    """Width / height, of a text "16:9" or a number, in [1 / most, most].

    Raises:
        ValueError: anything else.
    """
    width, colon, height = str(plain(value)).partition(":")
    try:
        found = float(width) / (float(height) if colon else 1)
    except (ValueError, ZeroDivisionError):
        found = math.nan
    if not 1 / most <= found <= most:  # also of NaN
        limit = f", at most {most:g}:1 or 1:{most:g}" if math.isfinite(most) else ""
        raise ValueError(
            f"{name} must be width:height, such as 16:9, or their ratio, such as 1.5{limit}, not "
            f"{shown(value)}"
        )
    return found


def _in_range(name: str, number: Any, low: Any, high: Any) -> Any:
    under = low is not None and number < low
    if not under and (high is None or number <= high):
        return number
    wanted = f"at least {low}" if under else f"at most {high}"
    if isinstance(number, float) and None not in (low, high):
        wanted = f"in [{low}, {high}]"
    raise ValueError(f"{name} must be {wanted}, not {shown(number)}")


def as_tensor(name: str, value: Any, whole: bool | None = False) -> torch.Tensor:
    """A tensor, also from a NumPy array.

    Args:
        name: of the argument.
        value: what was given.
        whole: whether it must hold whole numbers, of any integer type, which become int64, or
            floating-point numbers, which stay as they are; None: either.

    Raises:
        ValueError: no tensor, or of another kind.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, not {shown(value)}")
    integers = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if whole is False and not value.is_floating_point():
        raise ValueError(f"{name} must hold floating-point numbers, not {value.dtype}")
    if not integers and (whole or not value.is_floating_point()):
        raise ValueError(f"{name} must hold whole numbers, not {value.dtype}")
    return value.long() if integers else value


def one_of(name: str, value: Any, kind: Any, more: str = "") -> Any:
    """One of the values of a `Literal`.

    Args:
        name: of the argument.
        value: what was given.
        kind: the `Literal`.
        more: what else would do, for the message.

    Raises:
        ValueError: another value.
    """
    if not isinstance(value, (str, int)) or value not in get_args(kind):
        raise ValueError(f"{name} must be one of {get_args(kind)}{more}, not {shown(value)}")
    return value


def fitting(name: str, value: Any, kind: Any) -> Any:
    """A value of the kind that an annotation names: numbers of any library are numbers.

    An int stays one where a float is wanted. Items of lists, tuples and dicts are converted too,
    and all sequences become lists, as JSON has them.

    Args:
        name: of the argument.
        value: what was given.
        kind: the annotation; of one that is not understood every value is.

    Raises:
        ValueError: a value of another kind.
    """
    if isinstance(value, np.generic):
        value = value.item()
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return _plain_inside(value)
    if origin in (Union, UnionType):
        if is_function(value) and any(get_origin(each) is Literal for each in inner):
            return value  # one's own, in the place of a name
        return _fitting_any(name, value, inner)
    if origin is Literal:
        return one_of(name, value, kind)
    if kind is int:
        return whole(name, value, -LARGEST, LARGEST)
    if kind is float:
        number = plain(value)
        return int(number) if type(number) is int and real(name, number) else real(name, number)
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {shown(value)}")
    if kind is str:
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError(f"{name} must be a string, not {shown(value)}")
        return value if isinstance(value, str) else str(as_path(value, name))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        items = plain(value)
        if not isinstance(items, list):
            raise ValueError(f"{name} must be a list, not {shown(value)}")
        each = inner[0] if inner else Any
        return [fitting(f"{name}[{i}]", item, each) for i, item in enumerate(items)]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be a dict, not {shown(value)}")
        return {key: fitting(f"{name}[{key!r}]", item, inner[1]) for key, item in value.items()}
    if isinstance(kind, type) and origin is None and not isinstance(value, kind):
        found = shown(value) if isinstance(value, PLAIN) else _a(type(value))
        raise ValueError(f"{name} must be {_a(kind)}, not {found}")
    return value


def _a(kind: type) -> str:
    return f"a{'n' * kind.__name__.startswith(tuple('AEIOU'))} {kind.__name__}"


def _fitting_any(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """A value of one of several kinds."""
    if value is None and NoneType in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is not NoneType:
            try:
                return fitting(name, value, kind)
            except ValueError as error:
                errors.append(error)
    raise errors[0]


def _plain_inside(value: Any) -> Any:
    """With NumPy's and torch's numbers in lists, tuples and dicts as Python's."""
    if isinstance(value, dict):
        return {key: _plain_inside(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_inside(item) for item in value]
    return value.tolist() if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) else value


class Missing:
    """A function of somebody's own, of which a file knows no more than what it was called."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any) -> Any:
        raise ValueError(f"{self}: give it again, or another in its place")

    def __repr__(self) -> str:
        return (
            f"{printable(self.name, 120)} (a function of one's own, which the file does not hold)"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Missing) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


def is_function(value: Any) -> bool:
    """Whether this is a function of somebody's own, and no module or class."""
    return callable(value) and not isinstance(value, (type, torch.nn.Module))


def with_names(value: Any) -> Any:
    """Settings as a file can hold them: each function as {"function": what it is called}."""
    if isinstance(value, Missing):
        return {"function": value.name}
    if is_function(value):
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return {"function": f"{getattr(value, '__module__', None)}.{name}"}
    if isinstance(value, dict):
        return {key: with_names(item) for key, item in value.items()}
    return value


def without_functions(value: Any) -> Any:
    """What `with_names` made, with `Missing` in the place of the functions."""
    if not isinstance(value, dict):
        return value
    if value.keys() == {"function"} and isinstance(value["function"], str):
        return Missing(value["function"])
    return {key: without_functions(item) for key, item in value.items()}
