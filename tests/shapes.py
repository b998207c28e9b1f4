"""The run-time check of the shape annotations, and of nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
from beartype import beartype


def check(function):
    """Check the tensors alone: what a user may mistype is answered by the package itself."""
    if not isinstance(function, type):
        annotations = function.__annotations__.items()
        function.__annotations__ = {k: v for k, v in annotations if "Tensor" in str(v)}
    return beartype(function)


@contextmanager
def unchecked() -> Iterator[None]:
    """For tests of what the package itself says to a tensor of a wrong shape."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
