"""What comes when: for any seed, batch size and number of processes."""

import copy
from itertools import islice

import pytest
import torch

from muse_maskgit_pytorch.data.order import EndlessBatches, Order, Sample


def order(
    size: int, batch: int, count: int, *, seed=0, start=0, rank=0, world=1
) -> list[list[int]]:
    return list(islice(EndlessBatches([range(size)], batch, seed, start, rank, world), count))


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


def test_each_epoch_has_every_item_once():
    indices = flat(order(10, 4, 25))
    epochs = [indices[start : start + 10] for start in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


def test_the_order_is_that_of_earlier_releases():
    assert flat(order(7, 7, 2, seed=3)) == [
        int(i)
        for epoch in (0, 1)
        for i in torch.randperm(7, generator=torch.Generator().manual_seed(3_000_009 + epoch))
    ]


def test_order_depends_on_the_seed_and_the_position_alone():
    assert order(10, 4, 20) == order(10, 4, 20)
    assert order(10, 4, 20) != order(10, 4, 20, seed=1)
    assert order(3, 8, 2)[0].count(0) in (2, 3)  # a batch larger than the set


@pytest.mark.parametrize("batch, world", [(4, 1), (6, 1), (3, 2), (1, 3)])
def test_a_resume_goes_on_at_the_same_sample_with_any_batches(batch: int, world: int):
    whole = flat(order(10, 4, 20))
    shares = [order(10, batch, 4, start=12, rank=rank, world=world) for rank in range(world)]
    resumed = [i for k in range(4) for share in shares for i in share[k]]
    assert resumed == whole[12 : 12 + len(resumed)]


def test_a_sample_knows_its_position_in_other_processes_too():
    sample = copy.copy(order(10, 4, 1, start=23)[0][2])  # travels as it does to a worker
    assert isinstance(sample, Sample)
    assert sample.position == 25
    assert sample == Order(10, 0)[25]


def test_another_default_device_changes_nothing():
    expected = order(10, 4, 3)
    with torch.device("meta"):
        assert order(10, 4, 3) == expected
