"""Is the loader the limit? Images a second of decoding and scaling, against what training takes.

    python benchmarks/loader.py

One table. Sources, all of synthetic pictures (textures, of which the larger files have a sensor's
noise, saved with quality 90): images a second with `num_workers` of 0, 1 and 2 if each loading
process has a core of its own, by its CPU time; then, with two, by the clock, beside whatever else
this machine does. "whole" decodes all pixels of a photograph, as `images.read_image`; the lines
beside it go through `images.read_reduced`, as training does. Below them, what the recipes' steps
take: of the small ones measured here, with AdamW, on one thread (for a second of CPU time); of the
others derived from the operations that `muse estimate` counts and its assumptions about GPUs. The
transformers' steps begin at token ids, as they do from a cache.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from muse_maskgit_pytorch import MaskGit, MaskGitTransformer, TextEmbeds, TokenCache, VQGanVAE
from muse_maskgit_pytorch.cli.main import main as muse
from muse_maskgit_pytorch.data import ImageDataset
from muse_maskgit_pytorch.data.folder import open_source
from muse_maskgit_pytorch.data.order import EndlessBatches, buckets_of
from muse_maskgit_pytorch.data.pixels import View
from muse_maskgit_pytorch.data.stream import RowStream, Stream
from muse_maskgit_pytorch.data.workers import leave_signals_to_the_run, starting_processes
from muse_maskgit_pytorch.images import center_crop, read_image, to_tensor

RECIPES = Path(__file__).parents[1] / "recipes"
GPUS = ("rtx3060", "rtx4090", "h100")
SMALL, COUNT, PHOTOS = (320, 384), 64, 6  # height and width of small pictures; numbers of files
SEEDS = 2  # textures of the photographs
CACHED = 5440  # images of the token cache


def texture(height: int, width: int, noise: float, seed: int) -> Image.Image:
    """A picture with detail of all sizes, of half the strength at half the size, and noise."""
    random = np.random.default_rng(seed)
    total, cells = np.zeros((height, width, 3), np.float32), 4
    while cells <= width:
        rows = max(2, height * cells // width)
        grid = random.integers(0, 256, (rows, cells, 3), dtype=np.uint8)
        large = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(large, np.float32) - 128) / cells
        cells *= 2
    total = 128 + 45 * total / total.std()
    total += noise * random.standard_normal((height, width, 1), np.float32)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({} if kind == "PNG" else {"quality": 90}))
    return file.getvalue()


def write_sources(place: Path) -> dict[str, str]:
    """Folders and files of each kind, by what the table calls them."""
    names: dict[str, str] = {}
    small = [texture(*SMALL, 4, seed) for seed in range(COUNT)]
    for kind in ("JPEG", "PNG", "WEBP"):
        folder = place / kind
        folder.mkdir()
        for number, image in enumerate(small):
            (folder / f"{number:03d}.{kind.lower()}").write_bytes(encoded(image, kind))
            (folder / f"{number:03d}.txt").write_text(f"picture {number}")
        names[f"{kind}, {SMALL[1]} x {SMALL[0]}"] = str(folder)
    jpegs = [encoded(image, "JPEG") for image in small]
    texts = [f"picture {number}" for number in range(COUNT)]
    rows = pyarrow.table({"image": jpegs, "text": texts})
    for part in range(2):  # a file for each of two loading processes
        half = range(part * COUNT // 2, (part + 1) * COUNT // 2)
        pyarrow.parquet.write_table(rows.slice(half.start, len(half)), place / f"{part}.parquet")
        with tarfile.open(place / f"{part}.tar", "w") as tar:
            for number in half:
                for ending, raw in (("jpg", jpegs[number]), ("txt", texts[number].encode())):
                    member = tarfile.TarInfo(f"{number:03d}.{ending}")
                    member.size = len(raw)
                    tar.addfile(member, io.BytesIO(raw))
    names["the same JPEGs as Parquet rows"] = f"{place}/*.parquet"
    names["the same as WebDataset tars, streamed"] = f"{place}/*.tar"
    for noise in (0, 6):
        folder = place / f"photographs {noise}"
        folder.mkdir()
        for seed in range(SEEDS):
            raw = encoded(texture(3000, 4000, noise, seed), "JPEG")
            for copy in range(PHOTOS // SEEDS):
                (folder / f"{seed}-{copy}.jpg").write_bytes(raw)
        size = sum(file.stat().st_size for file in folder.iterdir()) / PHOTOS
        names[f"photographs of 12 megapixels, {size / 1e6:.1f} MB"] = str(folder)
    return names


def batches_of(data: Any, batch: int, workers: int) -> Iterator[Any]:
    """Batches without end, loaded as a trainer loads them."""
    if isinstance(data, Stream):
        return data.batches_from(0, list, batch_size=batch, rank=0, world=1, workers=workers)
    loader = DataLoader(
        data,
        batch_sampler=EndlessBatches(list(buckets_of(data).values()), batch, 0, 0, 0, 1),
        num_workers=workers,
        worker_init_fn=leave_signals_to_the_run,
        collate_fn=lambda items: items,
    )
    with starting_processes():
        return iter(loader)


def used() -> float:
    """Seconds of CPU time that the loading processes, or else this one, have taken so far."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user mode and in the kernel
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else time.process_time()


def rates(data: Any, batch: int, workers: int, seconds: float) -> tuple[float, float]:
    """Images a second if each loading process has a core, and as it was by the clock."""
    batches, count = batches_of(data, batch, workers), 0
    for _ in range(max(1, 2 * workers)):  # all processes are at work
        next(batches)
    began = time.monotonic(), used()
    while time.monotonic() < began[0] + seconds:
        next(batches)
        count += batch
    passed = time.monotonic() - began[0], used() - began[1]
    return count * max(1, workers) / passed[1], count / passed[0]


def opened(name: str, size: int) -> Any:
    """The data of a name, as a trainer has them."""
    source = open_source(name, None, streaming=name.endswith(".tar"))
    if isinstance(source, RowStream):
        return Stream(source, View(size), block=COUNT // 2)
    return ImageDataset(source, size)


def whole(folder: str, size: int) -> float:
    """Images for a second of CPU time where all pixels are decoded."""
    spent = []
    for path in sorted(Path(folder).iterdir()):
        began = time.process_time()
        to_tensor(center_crop(read_image(path), (size, size)), size)
        spent.append(time.process_time() - began)
    return 1 / median(spent)


def step_rate(recipe: dict[str, Any], vae: VQGanVAE) -> float:
    """Images of a recipe's training steps for a second of CPU time, on one thread."""
    batch = recipe["trainer"]["batch_size"]
    if "transformer" in recipe:
        changes = recipe["transformer"] | {"t5_name": "none", "text_embed_dim": 384}
        settings = recipe["maskgit"]
        length = vae.fmap_size(settings["image_size"]) ** 2
        transformer = MaskGitTransformer(num_tokens=vae.codebook_size, seq_len=length, **changes)
        model = MaskGit(vae=vae, transformer=transformer, **settings)
        given: dict[str, Any] = {"text_embeds": TextEmbeds.of(torch.randn(batch, 12, 384))}
        if low := settings.get("cond_image_size"):
            grid = batch, vae.fmap_size(low) ** 2
            given["cond_ids"] = torch.randint(vae.codebook_size, grid)
        ids = torch.randint(vae.codebook_size, (batch, length))
        trained: Any = model.transformer

        def loss() -> torch.Tensor:
            return model(ids, **given)
    else:
        trained = vae
        images = torch.rand(batch, 3, *[recipe["trainer"]["image_size"]] * 2)

        def loss() -> torch.Tensor:
            recon, quantized = vae(images)
            return F.l1_loss(recon, images) + quantized.loss

    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], fused=True)
    spent = []
    for _ in range(6):
        began = time.process_time()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        spent.append(time.process_time() - began)
    return batch / median(spent[1:])


def derived(recipe: str, gpu: str) -> float:
    """Images a second on a GPU, from what `muse estimate` prints."""
    said = io.StringIO()
    with redirect_stdout(said):
        failed = muse(["estimate", str(RECIPES / f"{recipe}.yaml"), "--gpu", gpu])
    if failed:
        raise RuntimeError(f"muse estimate {recipe} failed")
    work = re.findall(r"ward, an image +([\d,.]+) GFLOP", said.getvalue())
    [(tflops, share)] = re.findall(r"at ([\d.]+) TFLOP/s, of which (\d+)%", said.getvalue())
    return float(tflops) * 10 * int(share) / sum(float(each.replace(",", "")) for each in work)


def show(name: str, size: object, *found: float) -> None:
    """A line of the table."""
    cells = [f"{each:,.0f}" for each in found] + [""] * (4 - len(found))
    print(f"| {name} | {size} | {' | '.join(cells)} |", flush=True)


def show_data(name: str, size: int, data: Any, batch: int, seconds: float) -> None:
    found = [rates(data, batch, workers, seconds) for workers in (0, 1, 2)]
    show(name, size, *(core for core, _ in found), found[-1][1])


def show_sources(place: Path, seconds: float) -> None:
    for name, where in write_sources(place).items():
        photographs = name.startswith("photographs")
        for size in (128, 256) if photographs else (128,):
            if photographs:
                show(f"{name}, whole", size, whole(where, size))
            show_data(name, size, opened(where, size), 2 if photographs else 8, seconds)
    synthetic = import_module("cache")  # beside this file
    synthetic.write_synthetic(place / "cache", CACHED)
    cache = TokenCache(place / "cache", synthetic.make_model())
    show_data("`TokenCache`", 64, cache, 64, seconds)


def show_steps() -> None:
    recipes = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES.glob("*.yaml")}
    vae = VQGanVAE(**recipes["small-vae"]["vae"])
    for name in ("small-vae", "small-base", "small-superres"):
        recipe = recipes[name]
        size = (recipe.get("maskgit") or recipe["trainer"])["image_size"]
        show(f"*takes*: {name}, here", size, step_rate(recipe, vae))
        vae.requires_grad_(False)
    for name in ("folder-vae", "folder-base", "folder-superres"):
        recipe = recipes[name]
        size = (recipe.get("maskgit") or recipe["trainer"])["image_size"]
        for gpu in GPUS:
            show(f"*takes*: {name}, {gpu} (derived)", size, derived(name, gpu))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| | px | images/s: 0 workers | 1 | 2 | 2, by the clock |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        os.environ["HF_DATASETS_CACHE"] = f"{place}/datasets"  # read at its first import
        show_sources(Path(place), args.seconds)
    show_steps()


if __name__ == "__main__":
    main()
