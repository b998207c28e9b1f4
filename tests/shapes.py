"""The run-time check of the shape annotations, and of nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType

import jaxtyping
from beartype import beartype


def check(function):
    """Check the tensors alone: what a user may mistype is answered by the package itself."""
    if not isinstance(function, FunctionType):
        return beartype(function)
    # of a copy, since the package reads its own annotations
    checked = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    checked.__dict__.update(function.__dict__)
    checked.__kwdefaults__, checked.__qualname__ = function.__kwdefaults__, function.__qualname__
    checked.__module__, checked.__doc__ = function.__module__, function.__doc__
    annotations = function.__annotations__.items()
    checked.__annotations__ = {k: v for k, v in annotations if "Tensor" in str(v)}
    return beartype(checked)


@contextmanager
def unchecked() -> Iterator[None]:
    """For tests of what the package itself says to a tensor of a wrong shape."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
