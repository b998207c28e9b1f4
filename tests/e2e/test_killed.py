"""Killed at any moment and resumed, a run ends as if nothing had happened."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm

from muse_maskgit_pytorch import VQGanVAE, VQGanVAETrainer, checkpoint
from muse_maskgit_pytorch.checkpoint import load_tree
from muse_maskgit_pytorch.training.checkpoints import Snapshots
from tests.runs import poison

KILLS = 20
SAVE_EVERY, KEEP = 2, 2
ENDLESS = 10**6  # steps: the run is as long as twenty lives make it, however slow the machine
CHECKPOINTS = "vae-checkpoint-*.safetensors"
WEIGHTS = ("vae.safetensors", "vae-ema.safetensors")


def train(images: str, results: str, steps: int) -> None:
    """One life of the run, in a process of its own."""
    with open(f"{results}.log", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the killed would leave its own lock, one between processes
    # other weights than the first life began with: the checkpoint must bring all of them
    torch.manual_seed(os.getpid() if any(Path(results).glob(CHECKPOINTS)) else 0)
    vae = VQGanVAE(dim=16, codebook_size=48, layers=2, num_res_blocks=1, quantizer="vq")
    VQGanVAETrainer(
        vae, folder=images, image_size=16, batch_size=2, num_train_steps=steps, lr=1e-3,
        lr_schedule="constant", warmup_steps=4, perceptual_weight=0, gan_weight=0.1, gan_start=2,
        gan_ramp=4, lecam_weight=0.1, discriminator_dim=8, latent_noise=0.1, ema_decay=0.9,
        results_folder=results, resume=True, log_every=1, sample_every=0, save_every=SAVE_EVERY,
        keep_checkpoints=KEEP,
    ).train()  # fmt: skip


def train_averaged(images: str, results: str, end: tuple[str, int, int] | None) -> None:
    """One life of a run with snapshots, which returns to a checkpoint once.

    It ends "within" or "after" the writing of a snapshot: of which step, and for which time.
    """
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    torch.manual_seed(os.getpid() if any(Path(results).glob(CHECKPOINTS)) else 0)
    vae = VQGanVAE(dim=8, codebook_size=48, layers=2, num_res_blocks=1, quantizer="fsq")
    trainer = VQGanVAETrainer(
        vae, folder=images, image_size=16, batch_size=2, num_train_steps=10, lr=1e-3,
        warmup_steps=1, perceptual_weight=0, gan_weight=0, results_folder=results, resume=True,
        sample_every=0, save_every=4, posthoc_every=2, max_skips=2,
    )  # fmt: skip
    poison(trainer, {5: math.nan, 6: math.nan})
    original, times = Snapshots.write, Counter[int]()

    def half(tensors: Any, path: Path, **more: Any) -> None:
        path.write_bytes(b"half of a snapshot")
        os.kill(os.getpid(), signal.SIGKILL)

    def write(self: Snapshots, step: int, *rest: Any) -> None:
        times[step] += 1
        if end == ("within", step, times[step]):
            checkpoint.save_file = half  # type: ignore[assignment]
        original(self, step, *rest)
        if end == ("after", step, times[step]):
            os.kill(os.getpid(), signal.SIGKILL)

    Snapshots.write = write  # type: ignore[method-assign]
    trainer.train()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        pixels = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
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
        process.join(500)
        log = Path(f"{folder}.log").read_text()[-4000:]
        process.kill()
        assert process.exitcode == 0, log

    def kill(steps: int, moment: Callable[[int], bool], delay: float = 0.0) -> None:
        """Start lives until one is ended, ``delay`` seconds after the moment has come."""
        code: int | None = 0
        while code == 0:  # it may end by itself while we look away
            process = start(results, steps)
            while process.is_alive() and not moment(process.pid):
                time.sleep(0.0005)
            time.sleep(delay)
            process.kill()
            process.join()
            code = process.exitcode
        assert code == -signal.SIGKILL, Path(f"{results}.log").read_text()[-4000:]

    def uniform(limit: float) -> float:
        return limit * float(torch.rand((), generator=draw))

    def files(pattern: str) -> frozenset[str]:
        return frozenset(path.name for path in results.glob(pattern))

    def newest_step() -> int:
        return max((int(name[15:23]) for name in files(CHECKPOINTS)), default=0)

    def check() -> int:
        """All checkpoints can be read, and they are not too many; the step of the newest."""
        steps = [load_tree(results / name)[0]["step"] for name in files(CHECKPOINTS)]
        assert len(steps) <= KEEP + 1  # one more if killed between the writing and the removal
        return max(steps, default=0)

    pace, reached, within_saves = 0.0, [0], 0
    for life in range(KILLS):
        aim, old = reached[-1] + SAVE_EVERY * int(uniform(4)), files(".*")
        began = time.monotonic()
        if life < 2:  # the second one tells how long a life takes to two checkpoints
            kill(ENDLESS, lambda pid, aim=reached[-1] + 2 * SAVE_EVERY: newest_step() >= aim)
            pace = time.monotonic() - began
        elif life % 2:  # at any moment: as it begins, or after up to three checkpoints
            kill(ENDLESS, lambda pid, aim=aim: newest_step() >= aim, delay=uniform(pace / 2))
        else:  # within a save

            def saving(pid: int, aim: int = aim, old: frozenset[str] = old) -> bool:
                return bool(files(".*") - old) and newest_step() >= aim

            kill(ENDLESS, saving, delay=uniform(0.004))
            within_saves += bool(files(".*") - old)
        reached.append(check())
    assert reached == sorted(reached)  # never a step back
    assert reached[-1] >= SAVE_EVERY * KILLS
    assert within_saves >= 3

    steps = reached[-1] + 3
    for name in WEIGHTS:  # and twice more, at the very end
        kill(steps, lambda pid, name=name: bool(files(f".{name}.{pid}.tmp")))
        check()
    finish(results, steps)
    assert not files(".*")
    assert len(files(CHECKPOINTS)) == KEEP

    unbroken = tmp_path / "unbroken"
    finish(unbroken, steps)
    last = f"vae-checkpoint-{steps:08d}.safetensors"
    for name in (last, *WEIGHTS):
        tree, expected = (load_tree(folder / name)[0] for folder in (results, unbroken))
        for this in (tree, expected):  # of files to remove that the dead left, nothing to compare
            this.pop("written", None)
        assert_same(tree, expected, name)
    assert load_tree(results / last)[0]["modules"]["discriminator"]["anchors"].all()  # LeCam's
    assert curve(results) == curve(unbroken)


@pytest.mark.slow
def test_snapshots_outlive_kills(images: Path, tmp_path: Path):
    """Half-written, beyond the last checkpoint, of steps taken back, after a return."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["accelerate", __name__])

    def live(name: str, end: tuple[str, int, int] | None) -> None:
        given = str(images), str(tmp_path / name), end
        process = processes.Process(target=train_averaged, args=given)
        process.start()
        process.join(120)
        process.kill()
        assert process.exitcode == (0 if end is None else -signal.SIGKILL), end

    def snapshots(name: str) -> dict[int, bytes]:
        found = Snapshots(tmp_path / name, "vae").found()
        return {step: path.read_bytes() for step, path in found.items()}

    live("whole", None)
    whole = snapshots("whole")
    assert list(whole) == [2, 4, 6, 8, 10]
    left = []
    for end in (("within", 2, 1), ("after", 6, 1), ("after", 6, 2), ("within", 8, 1)):
        live("killed", end)
        left.append(snapshots("killed"))
    assert [len(found) for found in left] == [0, 3, 3, 3]
    assert left[1] != left[2]  # of the steps that are taken back, and of those that stay
    assert any((tmp_path / "killed").glob(".vae-snapshot-*"))
    live("killed", None)
    assert snapshots("killed") == whole
    assert not any((tmp_path / "killed").glob(".*snapshot*"))


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
