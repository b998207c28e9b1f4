"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """Keeps a moving average of tensors that training changes in place.

    The decay warms up as (1 + t) / (10 + t), so that the first averages are not the random
    initial weights. What no optimizer moves (counters, a codebook that is an average already, and
    whose revived codes leap) is copied.

    Args:
        tensors: name -> tensor; the very tensors that training changes.
        averaged: names of those to average.
        decay: of the average, in [0, 1).
    """

    def __init__(self, tensors: Mapping[str, Tensor], averaged: Collection[str], decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), not {decay}")
        self.decay = decay
        self.tensors = dict(tensors)
        self._averaged = [name for name in self.tensors if name in averaged]
        self.average = {name: value.detach().clone() for name, value in tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step ``step`` (1-based)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        names = self._averaged
        torch._foreach_lerp_(
            [self.average[n] for n in names], [self.tensors[n].detach() for n in names], weight
        )
        for name in self.tensors.keys() - set(names):
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
