"""FSDP2 by block: the loss and the gradients of a sharded model are those of the whole one.

The test launches this very file on two processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.training.losses import NamedTerms
from muse_maskgit_pytorch.training.parallel import shard

ROOT = Path(__file__).parents[2]


def compare() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(tiny.superres(token_critic=tiny.critic(seq_len=64)))
    whole, sharded = models
    terms = NamedTerms(sharded)
    shard(terms)
    batch = dict(
        images_or_ids=tiny.ids(2, 64),
        cond_ids=tiny.ids(),
        text_embeds=tiny.text(),
        mask=torch.arange(64).expand(2, 64) % 3 == 0,
    )
    torch.manual_seed(1)
    expected = whole.losses(**batch).total
    torch.manual_seed(1)
    loss = terms(**batch)["loss"]
    assert torch.equal(loss, expected)
    expected.backward()
    loss.backward()
    for (name, p), q in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert isinstance(q, DTensor) == p.requires_grad, name
        if p.grad is not None:
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=name)
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sharded_model_trains_as_the_whole_one():
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         __file__],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]


if __name__ == "__main__":
    compare()
