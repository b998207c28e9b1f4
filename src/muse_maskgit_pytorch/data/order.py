"""Which item comes when: a pure function of the seed and the position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class Sample(int):
    """The index of an item that knows its position in the training order.

    Any dataset takes it as an index; one that crops at random draws the crop from the position.
    """

    position: int

    def __new__(cls, index: int, position: int = 0) -> Sample:
        sample = super().__new__(cls, index)
        sample.position = position
        return sample


def draws(seed: int, position: int, count: int) -> list[float]:
    """So many numbers in [0, 1), a function of the seed and a place in the training order."""
    generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + position)
    return torch.rand(count, generator=generator, dtype=torch.float64, device="cpu").tolist()


def drawn(count: int, seed: int, position: int | None) -> int:
    """Which of so many captions an item comes with; the first where it has no position."""
    # the fifth number: those before decide a random crop
    return 0 if position is None else math.floor(draws(seed, position, 5)[4] * count)


class Order:
    """An endless order of items, a fresh permutation in each epoch.

    What comes at a position depends on (seed, position) alone.

    Args:
        size: number of items.
        seed: another seed, another order.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long, device="cpu")

    def __getitem__(self, position: int) -> Sample:
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + epoch)
            self._permutation = torch.randperm(self.size, generator=generator, device="cpu")
            self._epoch = epoch
        return Sample(int(self._permutation[place]), position)


class EndlessBatches(Sampler[list[int]]):
    """Batches of an `Order` without end, one share of each for every process.

    The start is counted in samples. So a run that is resumed with another batch size, accumulation
    or number of processes goes on with the sample at which it had stopped.

    Args:
        size: number of items.
        batch_size: items for each process.
        seed: of the order.
        start: samples that all processes together have already seen.
        rank: this process.
        world: number of processes.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int, rank: int, world: int):
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[int]]:
        order = Order(self.size, self.seed)
        first = self.start + self.rank * self.batch_size
        while True:
            yield [order[position] for position in range(first, first + self.batch_size)]
            first += self.batch_size * self.world


class Shares:
    """The batches of a data set, in order, shared out over the processes.

    Iterating gives the rows of a batch, how many of them count, and the batch: as many batches on
    every process, since all must call a model as often. One that has none left is given the last
    again, of which no row counts.

    Args:
        dataset: of which all processes have the same.
        batch_size: items in a batch.
        collate: makes a batch of items.
        rank: this process.
        world: number of processes.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, collate: Callable, rank: int = 0, world: int = 1
    ):
        self.count = len(dataset)  # type: ignore[arg-type]
        starts = range(0, self.count, batch_size)
        numbers = range(rank, -(-len(starts) // world) * world, world)
        self._rows, self._counted = [], []
        for number in numbers:
            start = starts[min(number, len(starts) - 1)]
            rows = range(start, min(start + batch_size, self.count))
            self._rows.append(rows)
            self._counted.append(len(rows) if number < len(starts) else 0)
        self._loader = DataLoader(dataset, batch_sampler=self._rows, collate_fn=collate)  # type: ignore

    def __iter__(self) -> Iterator[tuple[range, int, Any]]:
        yield from zip(self._rows, self._counted, self._loader, strict=True)
