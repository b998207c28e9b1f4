"""Two processes train as one: nothing hangs, and both end with the weights of a single one.

The test launches this very file, once on two processes and once on one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from muse_maskgit_pytorch import (
    ImageFolder,
    MaskGit,
    MaskGitTrainer,
    MaskGitTransformer,
    TokenCritic,
    VQGanVAE,
    VQGanVAETrainer,
)
from muse_maskgit_pytorch import testing as tiny
from muse_maskgit_pytorch.checkpoint import load_tree, save_tree
from muse_maskgit_pytorch.data import split
from muse_maskgit_pytorch.quantizer import QuantizerName

ROOT = Path(__file__).parents[2]
QUANTIZERS: dict[QuantizerName, int] = dict(vq=64, simvq=64, lfq=64, bsq=64, fsq=60)  # and codes
STEPS = 6
ROWS = 8  # of a stream
RATE = 1e-3  # peak learning rate
BATCH = 4  # on all processes together
VALID = 0.3
NO_GAN: dict[str, Any] = dict(gan_weight=0.0)
GAN: dict[str, dict[str, Any]] = {
    "vq": dict(
        gan_weight=0.1, gan_start=1, gan_ramp=2, lecam_weight=0.1, gradient_penalty_weight=1.0
    ),
    "lfq": dict(
        gan_weight=0.1, gan_start=0, lecam_weight=0.1, gan_loss="non_saturating",
        gan_adaptive=True, discriminator_lr=RATE / 2,
    ),
}  # fmt: skip


# What the launched processes do ------------------------------------------------------------------


def train_all(results: str, t5: str, resnet: str) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    common: dict[str, Any] = dict(
        folder="images", batch_size=BATCH // world, grad_accum_every=2, num_train_steps=STEPS,
        lr=RATE, warmup_steps=2, log_every=1, sample_every=3, save_every=2, valid_fraction=VALID,
    )  # fmt: skip

    def keep(name: str, trainer: Any) -> None:
        assert trainer.parallel.world == world
        state = {
            "modules": {n: m.state_dict() for n, m in trainer.modules().items()},
            "optimizers": {n: o.state_dict() for n, o in trainer.optimizers.items()},
            "ema": trainer.ema.average,
            "guard": trainer.guard.state(),
        }
        save_tree(f"{results}/{name}/rank{rank}.safetensors", state, kind="state")

    for kind, codes in QUANTIZERS.items():
        torch.manual_seed(rank)  # on purpose: the processes start with other weights
        vae = VQGanVAE(dim=8, codebook_size=codes, layers=2, num_res_blocks=1, quantizer=kind)
        trainer = VQGanVAETrainer(
            vae, image_size=16, perceptual_weight=0.1, perceptual_model=resnet,
            discriminator_dim=8, results_folder=f"{results}/{kind}",
            **GAN.get(kind, NO_GAN), **common,
        )  # fmt: skip
        trainer.train()
        keep(kind, trainer)

    # the masks differ from process to process in how many tokens they hide
    torch.manual_seed(5)
    model = MaskGit(
        vae=VQGanVAE(dim=8, codebook_size=60, layers=2, num_res_blocks=1, quantizer="fsq"),
        transformer=MaskGitTransformer(
            num_tokens=60, seq_len=16, dim=16, depth=1, dim_head=8, heads=2, t5_name=t5
        ),
        image_size=16,
        cond_drop_prob=0.0,
    )
    counts, draw = torch.tensor([1, 16, 3, 12])[:, None], model.draw_mask
    model.draw_mask = (
        lambda rows, size=(16, 16): (  # type: ignore[method-assign]
            torch.arange(math.prod(size) // 16) < counts[rank * rows :][:rows]
            if torch.is_grad_enabled()
            else draw(rows, size)
        )
    )
    stage = MaskGitTrainer(
        model, num_samples=5, results_folder=f"{results}/masked", aspect_ratios=["2:1", "1:1"],
        trackers="tensorboard", optimizer="muon", **common,
    )  # fmt: skip
    stage.train()
    keep("masked", stage)

    if world == 1:  # the rest draws other random numbers on each process
        return
    vae = VQGanVAE.from_pretrained(f"{results}/vq/vae-ema.safetensors")
    sizes: dict[str, dict[str, Any]] = {"base": {}, "superres": dict(cond_image_size=8)}
    for name, size in sizes.items():
        # self-conditioning happens in half of the steps only: the rest leaves weights unused
        shape: dict[str, Any] = dict(
            num_tokens=64, seq_len=16, dim=16, depth=1, dim_head=8, heads=2, t5_name=t5
        )
        model = MaskGit(
            vae=vae, transformer=MaskGitTransformer(**shape, self_cond=True), image_size=16,
            token_critic=TokenCritic(**shape), **size,
        )  # fmt: skip
        stage = MaskGitTrainer(
            model, num_samples=2, results_folder=f"{results}/{name}", max_minutes=60, **common
        )
        stage.train()
        keep(name, stage)
    train_streams(results, rank)


class Stream:
    """Pictures of classes, which know their place among them."""

    def __init__(self, count: int):
        self.count = count
        self.at = self.start = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.at, self.start = self.start, 0
        while self.at < self.count:
            self.at += 1
            at = self.at
            yield {"image": torch.full((3, 16, 16), at / self.count), "text": str(at - 1)}

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["at"]


def train_streams(results: str, rank: int) -> None:
    """A run that is broken off and one that is not, and one in which a process has no data."""

    def train(name: str, rows: int, **changes: Any) -> None:
        torch.manual_seed(7)
        model = tiny.maskgit(tiny.transformer(classes=ROWS, text_embed_dim=ROWS))
        settings: dict[str, Any] = dict(
            batch_size=2, num_train_steps=8, lr=RATE, warmup_steps=0, lr_schedule="constant",
            sample_every=0, save_every=3, valid_fraction=0.0, shuffle_buffer=4, num_samples=2,
            results_folder=f"{results}/{name}",
        )  # fmt: skip
        trainer = MaskGitTrainer(model, data=Stream(rows), **(settings | changes))
        step, seen = trainer.train_step, []

        def seeing(batches: Iterator[Any]) -> dict[str, Tensor]:
            batch = next(batches)
            seen.append(batch.texts)
            return step(iter([batch]))

        trainer.train_step = seeing  # type: ignore[method-assign]
        trainer.train()
        state = {"ema": trainer.ema.average, "seen": [int(text) for each in seen for text in each]}
        save_tree(f"{results}/{name}/rank{rank}.safetensors", state, kind="state")

    train("stream", ROWS)
    train("parts", ROWS, num_train_steps=4)
    train("parts", ROWS, resume=True)
    try:
        train("starved", 1)
        said = "trained"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    Path(f"{results}/starved-{rank}.txt").write_text(said)
    sys.stdout.flush()
    os._exit(0)  # the other process is gone, and torch would wait for it


# The test ----------------------------------------------------------------------------------------


def leaves(tree: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, f"{at}.{key}")
    else:
        yield at, tree


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_train_as_one(tmp_path: Path, t5: str, resnet: str):
    from tests.runs import PACE  # not of the launched processes

    (tmp_path / "images").mkdir()
    for i in range(15):
        size = (16, 16 if i % 3 else 32, 3)  # some are wide
        pixels = torch.randint(256, size, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(f"picture {i}")
    train, valid = split(ImageFolder(tmp_path / "images", 16), VALID)
    assert len(train) % BATCH != 0  # epochs end within a batch
    assert len(valid) > BATCH
    assert len(valid) % BATCH != 0
    assert len(valid) % 2 != 0

    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for results, how in {"two": launch, "one": []}.items():
        process = subprocess.run(
            [sys.executable, *how, __file__, results, t5, resnet],
            cwd=tmp_path,
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT / "src"),
                "ACCELERATE_USE_CPU": "true",
                "CUDA_VISIBLE_DEVICES": "",
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert process.returncode == 0, process.stderr[-4000:]

    two, one = tmp_path / "two", tmp_path / "one"
    for name in (*QUANTIZERS, "masked", "base", "superres"):
        first, second = (
            dict(leaves(load_tree(two / name / f"rank{rank}.safetensors")[0])) for rank in (0, 1)
        )
        assert first.keys() == second.keys()
        for key, value in first.items():
            other = second[key]
            same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
            assert same, f"{name}{key} differs between the processes"
        losses = [line["loss"] for line in log(two / name) if "loss" in line]
        assert len(losses) == STEPS
        assert torch.tensor(losses).isfinite().all()
        stage = "vae" if name in QUANTIZERS else name.replace("masked", "base")
        assert (two / name / f"{stage}-ema.safetensors").is_file()
        assert not list((two / name).glob("*.tmp"))

    # Sums over the batch are taken in another order: 1e-7 of each, and where a gradient is next
    # to nothing AdamW makes a small part of a step of it, whose length is the learning rate.
    for name in (*QUANTIZERS, "masked"):
        for a, b in zip(log(two / name), log(one / name), strict=True):
            a, b = ({k: v for k, v in line.items() if k not in {"stage", *PACE}} for line in (a, b))
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6), f"{name} at step {a['step']}"
        first, second = (
            load_tree(results / name / "rank0.safetensors")[0] for results in (two, one)
        )
        for part in ("modules", "ema"):
            torch.testing.assert_close(first[part], second[part], rtol=0, atol=0.2 * RATE)

    # a stream: no row on both, each as often as the others, and broken off or not the same
    whole, parts = (
        [load_tree(two / name / f"rank{rank}.safetensors")[0] for rank in (0, 1)]
        for name in ("stream", "parts")
    )
    for first, second in zip(whole, parts, strict=True):
        for key, value in first["ema"].items():
            assert torch.equal(value, second["ema"][key]), key
        assert second["seen"] == first["seen"][-len(second["seen"]) :]
    seen = [state["seen"] for state in whole]
    for start in (0, ROWS // 2):
        one_pass = [each[start : start + ROWS // 2] for each in seen]
        assert sorted(one_pass[0] + one_pass[1]) == list(range(ROWS))
    starved = [(two / f"starved-{rank}.txt").read_text() for rank in (0, 1)]
    assert "has no rows to train on for process 1 of 2" in starved[1]
    assert starved[0] != "trained"  # it ended too, and did not wait

    codebook = load_tree(two / "vq" / "rank0.safetensors")[0]["ema"]
    assert log(two / "vq")[0]["codebook_usage"] < 1
    assert codebook["quantizer.inner.counts"].all()  # so those that no vector chose were revived


if __name__ == "__main__":
    train_all(*sys.argv[1:])
