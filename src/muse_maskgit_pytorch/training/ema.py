"""Moving averages of weights, and how far back they reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

LONGEST = 12**-0.5  # the relative length of the plain mean of all steps

Decay = Callable[[int], float]  # of the average, in [0, 1], at the 1-based step


def warmed_up(decay: float) -> Decay:
    """A decay that rises as (1 + t) / (10 + t), so that first averages are no random weights.

    Raises:
        ValueError: a decay outside of [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), not {decay}")
    return lambda step: min(decay, (1 + step) / (10 + step))


def power(length: float) -> Decay:
    """The decay of an average that always reaches back a share of the training so far.

    After step t, step s has weighed (s^g - (s-1)^g) / t^g, with g = gamma + 1: Karras et al. 2024,
    "Analyzing and Improving the Training Dynamics of Diffusion Models", equations 4 to 6.

    Args:
        length: as of `gamma_of`.
    """
    gamma = gamma_of(length)
    return lambda step: (1 - 1 / step) ** (gamma + 1)


def gamma_of(length: float) -> float:
    """The exponent of the profile t^gamma of a relative length (equation 6 of the same).

    Args:
        length: sigma_rel, the profile's standard deviation as a share of the training, above 0 and
            up to that of the plain mean of all steps, 0.2887.

    Raises:
        ValueError: another length.
    """
    if not 0 < length <= LONGEST:
        raise ValueError(
            f"the length of an average must be above 0 and up to {LONGEST:.4f}, not {length:g}"
        )
    low, high = 0.0, 1 / length + 1  # the length falls where gamma rises, and is below 1 / gamma
    for _ in range(100):
        middle = (low + high) / 2
        longer = math.sqrt((middle + 1) / (middle + 3)) / (middle + 2) > length
        low, high = (middle, high) if longer else (low, middle)
    return low


class EMA:
    """Keeps a moving average of tensors that training changes in place.

    What no optimizer moves (counters, a codebook that is an average already, and whose revived
    codes leap) is copied.

    Args:
        tensors: name -> tensor; the very tensors that training changes.
        averaged: names of those to average.
        decay: `warmed_up` or `power`, say.
    """

    def __init__(self, tensors: Mapping[str, Tensor], averaged: Collection[str], decay: Decay):
        self.decay = decay
        self.tensors = dict(tensors)
        self.averaged = [name for name in self.tensors if name in averaged]
        self.average = {name: value.detach().clone() for name, value in tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step ``step`` (1-based)."""
        weight = 1 - self.decay(step)
        names = self.averaged
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
