"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Keeps a moving average of tensors that training changes in place.

    The decay warms up as (1 + t) / (10 + t), so that the first averages are not the random
    initial weights. Integer tensors (counters) are copied.

    Args:
        tensors: name -> tensor; the very tensors that the optimizer changes.
        decay: of the average, in [0, 1).
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), not {decay}")
        self.decay = decay
        self.tensors = dict(tensors)
        self.average = {name: value.detach().clone() for name, value in tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step ``step`` (1-based)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        floats = [n for n, v in self.tensors.items() if v.is_floating_point()]
        torch._foreach_lerp_(
            [self.average[n] for n in floats], [self.tensors[n].detach() for n in floats], weight
        )
        for name in self.tensors.keys() - set(floats):
            self.average[name].copy_(self.tensors[name])

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards its own again."""
        own = {name: value.detach().clone() for name, value in self.tensors.items()}
        try:
            self._write(self.average)
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, value in self.tensors.items():
            value.copy_(values[name])

    @torch.no_grad()
    def load(self, average: Mapping[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(average[name])
