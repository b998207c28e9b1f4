"""How processes share work, and what of accelerate's configuration is refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from muse_maskgit_pytorch.data.order import Shares
from muse_maskgit_pytorch.training.parallel import Parallel, placed_as


@pytest.mark.parametrize("size", [1, 4, 5, 9])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_row_counts_once_and_all_have_as_many_batches(size: int, world: int):
    seen, batches = Counter(), set()
    for rank in range(world):
        mine = list(Shares(torch.arange(size), 2, torch.stack, rank, world))  # type: ignore
        batches.add(len(mine))
        for rows, counted, batch in mine:
            assert batch.tolist() == list(rows)
            assert counted in (0, len(rows))
            seen.update(rows if counted else ())
    assert seen == Counter(range(size))
    assert len(batches) == 1


@pytest.mark.parametrize(
    ("settings", "precision", "words"),
    [
        ({}, "no", "FSDP of version 1: set fsdp_version: 2"),
        ({"FSDP_VERSION": "2"}, "fp16", "fp16 does not go with FSDP: use bf16 or no"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "no", "fsdp_offload_params"),
    ],
)
def test_what_the_trainers_do_not_do_is_refused(
    settings: dict, precision: str, words: str, monkeypatch: pytest.MonkeyPatch
):
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | settings).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        Parallel(precision)  # type: ignore[arg-type]


def test_a_single_process_has_all():
    parallel = Parallel("no")
    assert parallel.share([3, 4, 5]) == [3, 4, 5]
    assert parallel.sums({"a": 1.5}) == {"a": 1.5}
    images = torch.rand(3, 3, 2, 2)
    assert torch.equal(parallel.joined(images, 3), images)
    tree = {"ema": {"w": torch.ones(2)}, "step": 3}
    assert placed_as(tree, lambda place: torch.ones(2)) == tree
