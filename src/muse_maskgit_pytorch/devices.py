"""Where to compute, and how exactly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, checked.

    Args:
        name: such as "cpu" or "cuda:1". If None, a GPU where there is one, else the CPU.

    Raises:
        ValueError: this machine, or this build of torch, does not have the device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:  # both, depending on how torch was built
        raise ValueError(f"--device {name!r} cannot be used: {error}") from error


@contextmanager
def exact(device: torch.device | str) -> Iterator[None]:
    """Compute in the tensors' own precision: without autocast, and float32 as real float32.

    TF32 on a GPU and bfloat16 in a CPU's matrix products (`torch.set_float32_matmul_precision`)
    keep 8 to 10 bits of each factor: enough for training, too few to choose between neighbouring
    codes. The settings are the process's, and come back when the block ends.

    Args:
        device: where the block computes.
    """
    attribute, off = "fp32_precision", "ieee"
    backends: Any = torch.backends
    if hasattr(backends, attribute):
        parts = [backends.cuda.matmul, backends.cudnn.conv]
        parts += [backends.mkldnn.matmul, backends.mkldnn.conv]
    else:  # before torch 2.9; where both kinds of settings exist they must not be mixed
        attribute, off = "allow_tf32", False
        parts = [backends.cuda.matmul, backends.cudnn]
    before = [getattr(part, attribute) for part in parts]
    try:
        for part in parts:
            setattr(part, attribute, off)
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        for part, value in zip(parts, before, strict=True):
            setattr(part, attribute, value)
