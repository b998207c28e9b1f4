"""FSDP2: two processes that divide a model's weights train it as one that has them whole.

The test launches this very file: two processes that are told to divide it by what accelerate's
configuration sets, and go on in turn from the checkpoints of one and of two.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.tensor import DTensor

from muse_maskgit_pytorch import MaskGit, MaskGitTrainer, MaskGitTransformer, TokenCritic
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.checkpoint import CheckpointError
from muse_maskgit_pytorch.training.averages import posthoc_average
from muse_maskgit_pytorch.training.losses import NamedTerms
from muse_maskgit_pytorch.training.parallel import shard

ROOT = Path(__file__).parents[2]
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as `accelerate launch` sets them
RATE, BATCH, STEPS = 1e-3, 4, 6


def make_trainer(results: str, t5: str, **changes: Any) -> MaskGitTrainer:
    """A run whose masks are the same however its batches are divided."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(rank)  # on purpose: the processes start with other weights
    model = MaskGit(
        vae=tiny.vae(), transformer=MaskGitTransformer(
            num_tokens=tiny.CODES, seq_len=16, dim=16, depth=2, dim_head=8, heads=2, t5_name=t5
        ),
        image_size=16, cond_drop_prob=0.0,
    )  # fmt: skip
    masks = torch.arange(16) < torch.tensor([1, 16, 3, 12])[:, None]
    draw = model.draw_mask
    model.draw_mask = (
        lambda rows, size=None: (  # type: ignore[method-assign]
            masks[rank * rows :][:rows] if torch.is_grad_enabled() else draw(rows)
        )
    )
    settings: dict[str, Any] = dict(
        folder="images", batch_size=BATCH // world, grad_accum_every=2, num_train_steps=STEPS,
        lr=RATE, warmup_steps=2, log_every=1, sample_every=3, save_every=2, valid_fraction=0.3,
        num_samples=3, lr_schedule="constant", posthoc_every=3,
    )  # fmt: skip
    return MaskGitTrainer(model, results_folder=results, **settings | changes)


# What the two processes do -----------------------------------------------------------------------


def compare() -> None:
    """The loss and the gradients of a sharded model are those of the whole one."""
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


def train_all(t5: str) -> None:
    torch.set_num_threads(1)
    trainer = make_trainer("two", t5)
    compare()
    trainer.train()
    for name, p in trainer.maskgit.transformer.named_parameters():
        assert isinstance(p, DTensor), name
    moments = trainer.optimizers["model"].state_dict()["state"][0]["exp_avg"]
    assert isinstance(moments, DTensor)
    make_trainer("one-two", t5, resume=True).train()

    # self-conditioning takes a further pass, of which both processes must know
    torch.manual_seed(5)
    shape: dict[str, Any] = dict(
        num_tokens=tiny.CODES, seq_len=16, dim=16, depth=1, dim_head=8, heads=2, t5_name=t5
    )
    model = MaskGit(
        vae=tiny.vae(), transformer=MaskGitTransformer(**shape, self_cond=True), image_size=16,
        token_critic=TokenCritic(**shape), cond_image_size=8,
    )  # fmt: skip
    MaskGitTrainer(
        model, folder="images", results_folder="superres", batch_size=2, num_train_steps=4,
        warmup_steps=2, log_every=1, sample_every=2, valid_fraction=0.3, num_samples=2,
        mixed_precision="bf16", checkpoint_activations=True,
    ).train()  # fmt: skip
    dist.destroy_process_group()


# The test ----------------------------------------------------------------------------------------


def log(folder: Path) -> list[dict[str, float]]:
    from tests.runs import PACE  # not of the launched processes

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in {"stage", *PACE}}
        for line in lines
        if "warning" not in line  # of the batches, which are others on another number
    ]


def begin_from(source: Path, target: Path, step: int) -> None:
    """A run that was killed after this step."""
    shutil.copytree(source, target)
    for path in target.glob("*-checkpoint-*"):
        if path.stem[-8:] != f"{step:08d}":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_that_share_a_model_train_as_one(
    tmp_path: Path, t5: str, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "images").mkdir()
    for i in range(15):
        pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"picture {i}")
    monkeypatch.chdir(tmp_path)
    make_trainer("one", t5).train()
    begin_from(tmp_path / "one", tmp_path / "one-two", 4)
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         __file__, t5],
        env=os.environ | FSDP | {
            "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=500,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-6000:]
    two = tmp_path / "two"
    assert sorted(path.name for path in two.glob("*-checkpoint-*")) == [
        "base-checkpoint-00000004", "base-checkpoint-00000006"
    ]  # fmt: skip
    assert len(list(two.glob("*/shards/*.safetensors"))) == 4
    assert not list(two.glob(".*"))

    begin_from(two, tmp_path / "two-one", 4)
    make_trainer("two-one", t5, resume=True).train()

    # as closely as in test_two_processes
    for name in ("two", "one-two", "two-one"):
        for mine, theirs in zip(log(tmp_path / name), log(tmp_path / "one"), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6), name
        for file in ("base.safetensors", "base-ema.safetensors", "base-best.safetensors"):
            mine, theirs = (
                MaskGit.from_pretrained(tmp_path / run / file).state_dict() for run in (name, "one")
            )
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0.2 * RATE)
        mine, theirs = (
            posthoc_average(tmp_path / run, 0.08)[0].state_dict() for run in (name, "one")
        )
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.2 * RATE)
    assert any("valid_loss" in line for line in log(two))
    losses = [line["loss"] for line in log(tmp_path / "superres") if "loss" in line]
    assert len(losses) == 4
    assert torch.tensor(losses).isfinite().all()
    drawn = (two / "samples" / "base-00000006.png").read_bytes()
    assert drawn[:4] == b"\x89PNG"

    # what is missing is named
    victim = two / "base-checkpoint-00000006" / "shards"
    next(victim.iterdir()).unlink()
    with pytest.raises(
        CheckpointError, match=r"files were missing; to go on from .*00000004, move"
    ):
        make_trainer("two", t5, resume=True).train()


if __name__ == "__main__":
    train_all(sys.argv[1])
