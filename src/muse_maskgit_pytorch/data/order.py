"""Which item comes when: a pure function of the seed and the position."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class Turns:
    """Which bucket's turn it is to fill a batch: an endless order, a fresh one in each epoch.

    By the end of an epoch every bucket has filled as many whole batches as all that it has given
    by then allow. What it has left over goes into the next epoch.

    Args:
        counts: items of each bucket.
        batch: items of a turn.
        seed: another seed, another order.
    """

    def __init__(self, counts: Sequence[int], batch: int, seed: int):
        self.counts, self.batch, self.seed = counts, batch, seed
        self._epoch, self._turns = -1, torch.empty(0, dtype=torch.long, device="cpu")

    def _before(self, epoch: int) -> list[int]:
        """Turns of each bucket before an epoch."""
        return [epoch * count // self.batch for count in self.counts]

    def __getitem__(self, number: int) -> tuple[int, int]:
        """The bucket of a turn, and how many turns it had before."""
        if len(self.counts) == 1:
            return 0, number
        last = (number + 1 + len(self.counts)) * self.batch // sum(self.counts) + 1
        epoch = bisect_right(range(last), number, key=lambda e: sum(self._before(e))) - 1
        before = self._before(epoch)
        if epoch != self._epoch:
            generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + epoch)
            pairs = zip(before, self._before(epoch + 1), strict=True)
            turns = torch.tensor([after - low for low, after in pairs], device="cpu")
            buckets = torch.arange(len(turns), device="cpu").repeat_interleave(turns)
            order = torch.randperm(len(buckets), generator=generator, device="cpu")
            self._epoch, self._turns = epoch, buckets[order]
        place = number - sum(before)
        bucket = int(self._turns[place])
        return bucket, before[bucket] + int((self._turns[:place] == bucket).sum())


class EndlessBatches(Sampler[list[int]]):
    """Batches without end, one share of each for every process; all shares are of one bucket.

    Each bucket has an `Order` of its own, which goes on from one of its `Turns` to the next: it
    gives every item once before any comes again, and what does not fill a batch comes in a later
    epoch. With a single bucket the batches are an `Order`, cut into pieces.

    The start is counted in samples. So a run that is resumed with another batch size, accumulation
    or number of processes goes on with the sample at which it had stopped; where there are several
    buckets, at the same place of its epoch, in which some items may then come twice or not at all.

    Args:
        buckets: numbers of the items in each; of all items, `range(size)` in a list.
        batch_size: items for each process.
        seed: of the order.
        start: samples that all processes together have already seen.
        rank: this process.
        world: number of processes.
    """

    def __init__(
        self, buckets: Sequence[Sequence[int]], batch_size: int, seed: int, start: int, rank: int,
        world: int,
    ):  # fmt: skip
        self.buckets = [rows for rows in buckets if len(rows)]
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[int]]:
        counts = [len(rows) for rows in self.buckets]
        orders = [Order(count, self.seed) for count in counts]
        together = self.batch_size * self.world
        turns = Turns(counts, together, self.seed)
        number, offset = divmod(self.start, together)
        own = range(
            offset + self.rank * self.batch_size, offset + (self.rank + 1) * self.batch_size
        )
        while True:
            bucket, before = turns[number]
            rows, order = self.buckets[bucket], orders[bucket]
            yield [
                Sample(rows[order[before * together + at]], number * together + at) for at in own
            ]
            number += 1


def buckets_of(dataset: Any) -> Mapping[Any, Sequence[int]]:
    """Numbers of a data set's items by their size; one that has no ``buckets`` is of one size."""
    found = getattr(dataset, "buckets", None)
    return {None: range(len(dataset))} if found is None else found


class Shares:
    """The batches of a data set, one bucket after the other, shared out over the processes.

    Iterating gives the rows of a batch, how many of them count, and the batch: as many batches on
    every process, since all must call a model as often, and at a time of the same bucket. One that
    has none left is given the last again, of which no row counts.

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
        self.dataset, self.batch_size, self.world = dataset, batch_size, world
        self.count = len(dataset)  # type: ignore[arg-type]
        self.buckets = buckets_of(dataset)
        self._rows, self._counted = [], []
        for bucket in self.buckets.values():
            starts = range(0, len(bucket), batch_size)
            for number in range(rank, -(-len(starts) // world) * world, world):
                start = starts[min(number, len(starts) - 1)]
                rows = [int(row) for row in bucket[start : start + batch_size]]
                self._rows.append(rows)
                self._counted.append(len(rows) if number < len(starts) else 0)
        self._loader = DataLoader(dataset, batch_sampler=self._rows, collate_fn=collate)  # type: ignore

    def __iter__(self) -> Iterator[tuple[list[int], int, Any]]:
        yield from zip(self._rows, self._counted, self._loader, strict=True)
