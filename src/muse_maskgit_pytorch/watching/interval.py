"""What a line of the log says of the steps since the line before it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..arguments import fitting

Reduce = Callable[[Tensor], Tensor]  # the sum of a tensor over all processes
T = TypeVar("T")


class Interval:
    """Means of a run's figures over the steps since the last line, and the pace of those steps.

    A batch says little of a run: its figures are added up where they are, and read when a line is
    written, so that no step waits for the device. A value that is not finite counts in no mean.
    """

    def __init__(self):
        self._sums: dict[tuple[str, ...], Tensor] = {}  # names -> (2, names): sums and counts
        self.start(0)

    def start(self, step: int) -> None:
        """From this step on the clock runs."""
        self._began = step, time.monotonic()
        self._waited = 0.0  # seconds

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; what the steps wait for them is added up."""
        while True:
            began = time.monotonic()
            batch = next(batches)
            self._waited += time.monotonic() - began
            yield batch

    @torch.no_grad()
    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Count one step's figures, scalars by name; other steps may have other names."""
        device = next(iter(terms.values())).device
        # in double precision sums of single ones are exact, whatever the order; Metal has none
        dtype = torch.float32 if device.type == "mps" else torch.float64
        values = torch.stack([value.detach().to(device, dtype) for value in terms.values()])
        finite = values.isfinite()
        pair = torch.stack([values.where(finite, 0.0), finite.to(dtype)])
        names = tuple(terms)
        self._sums[names] = self._sums[names] + pair if names in self._sums else pair

    def line(self, step: int, reduce: Reduce) -> dict[str, float]:
        """The means by name, and the pace; what follows is the next interval.

        Every process must call this. Of figures that were never finite the mean is NaN.

        Returns:
            also "steps_per_s", and "data_wait": the share of the time in which this process waited
            for its data.
        """
        sums: dict[str, float] = defaultdict(float)
        counts: dict[str, float] = defaultdict(float)
        for names, pair in self._sums.items():
            for name, total, count in zip(names, *reduce(pair).tolist(), strict=True):
                sums[name] += total
                counts[name] += count
        means = {name: sums[name] / counts[name] if counts[name] else math.nan for name in sums}
        first, began = self._began
        seconds = max(time.monotonic() - began, 1e-9)
        pace = {"steps_per_s": (step - first) / seconds, "data_wait": self._waited / seconds}
        self._sums = {}
        self.start(step)
        return means | pace

    def gather(self, reduce: Reduce, keep: bool) -> None:
        """Bring the sums of all processes to the one that keeps them. Every process must call it.

        A checkpoint is written by one process: so its `state` is that of all.
        """
        for names, pair in self._sums.items():
            total = reduce(pair)
            self._sums[names] = total if keep else torch.zeros_like(total)

    def state(self) -> list[Any]:
        """The sums, for a checkpoint."""
        return [{"names": list(names), "sums": pair} for names, pair in self._sums.items()]

    def load(self, state: list[Any], device: torch.device | str, keep: bool) -> None:
        """Go on from a `state`; ``keep`` as in `gather`.

        Raises:
            ValueError: sums that are not one for each name.
        """
        for part in state:
            fitting("names", part["names"], list[str])
            if part["sums"].shape != (2, len(part["names"])):
                raise ValueError("the sums of the log's figures are not one for each")
        self._sums = {tuple(part["names"]): part["sums"].to(device) * float(keep) for part in state}
