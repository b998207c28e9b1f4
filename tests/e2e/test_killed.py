"""Killed at any moment and resumed, a run ends as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from muse_maskgit_pytorch import VQGanVAE, VQGanVAETrainer
from muse_maskgit_pytorch.checkpoint import load_tree

KILLS = 20
KEEP = 2
ENDLESS = 10**6  # steps: the run is as long as twenty lives make it, however slow the machine
CHECKPOINTS = "vae-checkpoint-*.safetensors"
WEIGHTS = ("vae.safetensors", "vae-ema.safetensors")


def train(images: str, results: str, steps: int) -> None:
    """One life of the run, in a process of its own."""
    with open(f"{results}.log", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    # other weights than the first life began with: the checkpoint must bring all of them
    torch.manual_seed(os.getpid() if any(Path(results).glob(CHECKPOINTS)) else 0)
    vae = VQGanVAE(dim=16, codebook_size=48, layers=2, num_res_blocks=1, quantizer="vq")
    VQGanVAETrainer(
        vae, folder=images, image_size=16, batch_size=2, num_train_steps=steps, lr=1e-3,
        lr_schedule="constant", warmup_steps=4, perceptual_weight=0, gan_weight=0.1, gan_start=2,
        gan_ramp=4, lecam_weight=0.1, discriminator_dim=16, latent_noise=0.1, ema_decay=0.9,
        results_folder=results, resume=True, log_every=1, sample_every=0, save_every=2,
        keep_checkpoints=KEEP,
    ).train()  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(images: Path, tmp_path: Path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["accelerate", __name__])  # a life then starts in no time
    results = tmp_path / "killed"
    draw = torch.Generator().manual_seed(0)

    def start(folder: Path, steps: int) -> Any:
        process = processes.Process(target=train, args=(str(images), str(folder), steps))
        process.start()
        return process

    def finish(folder: Path, steps: int) -> None:
        process = start(folder, steps)
        process.join(300)
        log = Path(f"{folder}.log").read_text()[-4000:]
        process.kill()
        assert process.exitcode == 0, log

    def kill(steps: int, moment: Callable[[int], bool], delay: float = 0.0) -> None:
        """Start a life and end it ``delay`` seconds after the moment has come."""
        process = start(results, steps)
        while not moment(process.pid):
            assert process.is_alive(), Path(f"{results}.log").read_text()[-4000:]
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL

    def uniform(limit: float) -> float:
        return limit * float(torch.rand((), generator=draw))

    def files(pattern: str) -> set[str]:
        return {path.name for path in results.glob(pattern)}

    def newest() -> int:
        """Step of the newest checkpoint; all of them can be read, and they are not too many."""
        steps = [load_tree(results / name)[0]["step"] for name in sorted(files(CHECKPOINTS))]
        assert len(steps) <= KEEP + 1  # one more if killed between the writing and the removal
        return max(steps, default=0)

    # How long a life takes to its second checkpoint, killed as well.
    began = time.monotonic()
    kill(ENDLESS, lambda pid: len(files(CHECKPOINTS)) >= 2)
    pace = time.monotonic() - began
    reached, within_saves = [newest()], 0
    for life in range(1, KILLS):
        if life % 2:  # at any moment
            end = time.monotonic() + uniform(2 * pace)
            kill(ENDLESS, lambda pid, end=end: time.monotonic() > end)
        else:  # within a save, in the first one or later
            before, saves = reached[-1], 1 + int(uniform(3))

            def saving(pid: int, name: str = f"vae-checkpoint-{before + 2 * saves:08d}") -> bool:
                return bool(files(f".{name}.safetensors.{pid}.tmp*"))

            kill(ENDLESS, saving, delay=uniform(0.004))
        reached.append(newest())
        within_saves += bool(files(".*"))
    assert reached == sorted(reached)  # never a step back
    assert sum(a < b for a, b in zip([0, *reached], reached, strict=False)) >= KILLS // 2
    assert within_saves >= 3

    steps = reached[-1] + 3
    for name in WEIGHTS:  # and twice more, at the very end
        kill(steps, lambda pid, name=name: bool(files(f".{name}.{pid}.tmp*")))
        newest()
    finish(results, steps)
    assert files(".*") == set()
    assert len(files(CHECKPOINTS)) == KEEP

    unbroken = tmp_path / "unbroken"
    finish(unbroken, steps)
    last = f"vae-checkpoint-{steps:08d}.safetensors"
    for name in (last, *WEIGHTS):
        assert_same(load_tree(results / name)[0], load_tree(unbroken / name)[0], name)
    assert load_tree(results / last)[0]["modules"]["discriminator"]["anchors"].all()  # LeCam's
    assert curve(results) == curve(unbroken)


def curve(results: Path) -> dict[int, list[float]]:
    """Loss terms by step; of a step trained again after a kill the last ones."""
    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: [line["loss"], line["psnr"], line.get("lecam"), line["grad_norm"]]
        for line in lines
        if "loss" in line
    }


def assert_same(a: Any, b: Any, at: str) -> None:
    """Equal to the last bit, in any nesting."""
    assert type(a) is type(b), at
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, at
        assert torch.equal(a, b), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}.{i}")
    else:
        assert a == b, at
