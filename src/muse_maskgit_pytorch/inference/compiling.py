"""`torch.compile` from outside: functions that are compiled once for a process.

`MaskGit.compile` and `Muse.compile` switch it on. What is compiled are whole functions that take
the model as an argument (the loss, a sampling step, decoding), so modules, their names and their
copies in other precisions stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

VARIANTS = 64
F = TypeVar("F", bound=Callable[..., Any])

_compiled: dict[tuple[Any, str], Any] = {}


def compiled(function: F, options: dict[str, Any] | None) -> F:
    """A function compiled with options of `torch.compile`; itself if there are none."""
    if options is None:
        return function
    key = function, repr(sorted(options.items(), key=lambda option: option[0]))
    if key not in _compiled:
        # one function serves all models and shapes of a process; torch gives up after 8 of them
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, VARIANTS)
        _compiled[key] = torch.compile(function, **options)
    return _compiled[key]
