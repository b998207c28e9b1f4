"""Where to compute, and how exactly."""

from __future__ import annotations

import os
import threading
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
        device = torch.zeros(1, device=name).device
        if device.type == "meta":
            raise RuntimeError("it holds shapes without numbers")
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as torch was built
        raise ValueError(f"--device {name!r} cannot be used: {error}") from error


def cores() -> int:
    """How many cores this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def fast_precisions(device: torch.device) -> list[str]:
    """Which of fp16 and bf16 the device computes itself; in software they are very slow."""
    fast = {"fp16": True, "bf16": True}
    if device.type == "cuda":
        fast["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and torch.backends.mkldnn.is_available():
        fast["fp16"] = torch.ops.mkldnn._is_mkldnn_fp16_supported()
        fast["bf16"] = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [name for name, is_fast in fast.items() if is_fast]


# Where both kinds of settings exist (since torch 2.9) they must not be mixed.
_NEW = hasattr(torch.backends, "fp32_precision")
_ATTRIBUTE, _OFF = ("fp32_precision", "ieee") if _NEW else ("allow_tf32", False)
_lock, _inside, _before = threading.Lock(), 0, {}  # how many threads are in `exact`, and what was


def _parts() -> list[Any]:
    """What holds the settings."""
    backends: Any = torch.backends
    if not _NEW:
        return [backends.cuda.matmul, backends.cudnn]
    return [
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    ]


def arithmetic() -> tuple[Any, ...]:
    """The settings that decide the last bits of a sum on a device: equal ones, equal bits."""
    return torch.get_num_threads(), *(getattr(part, _ATTRIBUTE) for part in _parts())


@contextmanager
def exact(device: torch.device | str) -> Iterator[None]:
    """Compute in the tensors' own precision: without autocast, and float32 as real float32.

    TF32 on a GPU and bfloat16 in a CPU's matrix products (`torch.set_float32_matmul_precision`)
    keep 8 to 10 bits of each factor: enough for training, too few to choose between neighbouring
    codes. The settings are the process's, and come back when the last block of all threads ends.

    Args:
        device: where the block computes.
    """
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _before.update({part: getattr(part, _ATTRIBUTE) for part in _parts()})
            for part in _before:
                setattr(part, _ATTRIBUTE, _OFF)
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for part, value in _before.items():
                    setattr(part, _ATTRIBUTE, value)
