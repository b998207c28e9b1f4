"""Token caches: memory and start-up against the number of images, reading, and encoding.

    python benchmarks/cache.py                          # 10,000 and 1,000,000 images, 10 GB
    python benchmarks/cache.py --encode my_images       # images a second, with and without workers

The caches are synthetic: random ids of 64 tokens and texts of 12 tokens, 384 wide. Of each a fresh
process opens a `MaskGitTrainer` and trains; its figures:

- start-up: from the call of `MaskGitTrainer` to the end of the first step, imports of accelerate
  included: wall time, and the process's own CPU time, which other work on the machine moves less;
- memory: the peak of the resident set (`VmHWM`, all pages that the process has, those of files
  included). Shards are read and not mapped, so there are no pages of theirs in it;
- reading: samples for a second of CPU time, in random batches of 64, in the same process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from muse_maskgit_pytorch import MaskGit, MaskGitTrainer, MaskGitTransformer, TokenCache, VQGanVAE
from muse_maskgit_pytorch.data import ImageDataset, ImageFolder
from muse_maskgit_pytorch.data.cache import IdSet, Manifest, Plan, Texts, shard_path
from muse_maskgit_pytorch.data.encoding import write_cache
from muse_maskgit_pytorch.data.order import EndlessBatches
from muse_maskgit_pytorch.data.shards import write_shard
from muse_maskgit_pytorch.data.source import fingerprint, place
from muse_maskgit_pytorch.loading import open_stage

LENGTH, WIDTH, ROWS = 12, 384, 5440  # of a text; rows of a shard, as `write_cache` takes them


def make_model() -> MaskGit:
    torch.manual_seed(0)
    vae = VQGanVAE(dim=8, codebook_size=4096, quantizer="fsq", layers=3, num_res_blocks=1)
    transformer = MaskGitTransformer(
        num_tokens=4096, seq_len=64, dim=64, depth=2, heads=2, dim_head=32,
        t5_name="none", text_embed_dim=WIDTH, max_text_len=64,
    )  # fmt: skip
    return MaskGit(vae=vae, transformer=transformer, image_size=64, sample_options={"timesteps": 4})


def write_synthetic(folder: Path, images: int) -> None:
    """A cache in the format of `write_cache`, of random numbers."""
    model, random = make_model(), np.random.default_rng(0)
    keys = [f"{i:08d}.jpg" for i in range(images)]
    plan = Plan(
        images=images, crops=0, ids=IdSet.all_of(model), texts=Texts.of(model), rows=ROWS,
        view={"size": 64, "crop": "center", "crop_scale": [0.5, 1.0], "flip": False, "seed": 0},
        source=fingerprint(keys), cond_source=None,
    )  # fmt: skip
    folder.mkdir(parents=True)
    table, block = [], random.standard_normal((ROWS * LENGTH, WIDTH)).astype(np.float16)
    for number in range(plan.shards):
        names = [key.encode() for key in keys[number * ROWS : (number + 1) * ROWS]]
        count = len(names)
        arrays = {
            "ids0": random.integers(4096, size=(count, 1, 64), dtype=np.uint16),
            "texts": block[: count * LENGTH],
            "text_starts": np.arange(count + 1) * LENGTH,
            "first_texts": np.arange(count + 1),
            "captions": np.frombuffer(b"".join(names), np.uint8),
            "caption_starts": np.arange(count + 1) * len(names[0]),
            "keys": np.frombuffer(b"".join(names), np.uint8),
            "key_starts": np.arange(count + 1) * len(names[0]),
            "places": np.array([place(name.decode(), 0) for name in names]),
            "readable": np.ones(count, np.uint8),
        }
        path = shard_path(folder, number)
        write_shard(path, arrays, plan.digest)
        table.append([count, 0, path.stat().st_size])
    summary = {"source": "random", "items": images, "fingerprint": plan.source, "left_out": {}}
    Manifest(plan, summary, [64], table).write(folder)


def peak() -> float:
    """Of this process's resident set, in MB."""
    [line] = [x for x in Path("/proc/self/status").read_text().split("\n") if "VmHWM" in x]
    return int(line.split()[1]) / 1024


def measure(folder: str, steps: int) -> None:
    """Train from a cache and print what it took."""
    torch.set_num_threads(1)
    model, before = make_model(), peak()
    with tempfile.TemporaryDirectory() as results:
        began = time.monotonic(), time.process_time()
        trainer = MaskGitTrainer(
            model, cache=folder, results_folder=results, batch_size=64, num_train_steps=steps,
            log_every=steps, sample_every=0, max_valid=64, num_samples=2,
        )  # fmt: skip
        original, first = trainer.train_step, []

        def step(batches):
            done = original(batches)
            first.append((time.monotonic() - began[0], time.process_time() - began[1]))
            return done

        trainer.train_step = step  # type: ignore[method-assign]
        trainer.train()
    trained = peak()
    cache = TokenCache(folder, model)
    batches = iter(EndlessBatches([range(len(cache))], 64, 1, 0, 0, 1))
    count, start = 100, time.process_time()
    for _ in range(count):
        cache.__getitems__(next(batches))
    rate = 64 * count / (time.process_time() - start)
    print(
        f"{len(cache):>10,} {cache.nbytes() / 1e9:>7.2f} {first[0][0]:>12.2f} {first[0][1]:>7.2f} "
        f"{before:>12.0f} {trained:>10.0f} {peak():>12.0f} {rate:>12,.0f}",
        flush=True,
    )


def encode(folder: str, model: str, workers: list[int]) -> None:
    """Images a second of `write_cache`."""
    stage = open_stage(model)
    for count in workers:
        source = ImageFolder(folder, stage.image_size, captions=True).source
        dataset = ImageDataset(source, stage.image_size, True, stage.cond_image_size)
        with tempfile.TemporaryDirectory() as out:
            print(f"{model}, {count} workers, {torch.get_num_threads()} threads: ", end="")
            write_cache(Path(out) / "cache", stage, dataset, num_workers=count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--steps", type=int, default=60, help="of training, of 64 images each")
    parser.add_argument("--place", help="where to write the caches; by default a temporary folder")
    parser.add_argument("--encode", metavar="FOLDER", help="captioned images to encode instead")
    parser.add_argument("--model", default="scenes:base", help="stage that they are encoded for")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.steps)
    if options.encode:
        return encode(options.encode, options.model, options.workers)
    print(
        f"{'images':>10} {'GB':>7} {'start-up, s':>12} {'CPU, s':>7} {'before, MB':>12} "
        f"{'trained':>10} {'read, too':>12} {'samples/s':>12}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        for images in options.images:
            folder = Path(place) / str(images)
            write_synthetic(folder, images)
            words = [sys.executable, __file__, "--measure", str(folder)]
            done = subprocess.run(
                [*words, "--steps", str(options.steps)], capture_output=True, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(done.stderr)
            print(next(x for x in done.stdout.split("\n") if x.startswith(f"{images:>10,}")))
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
