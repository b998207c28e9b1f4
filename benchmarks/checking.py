"""CPU time to list and check a folder of many small files.

    python benchmarks/checking.py --files 100000

"listing" is what a training does before its first step: names, captions beside the images and every
header (`Folder`). "looking" is `muse data check`: every picture decoded, compared with all others.
One core; the files are PNGs of 64 px, each with a caption file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from muse_maskgit_pytorch.data import Folder
from muse_maskgit_pytorch.data.check import check_data


def write(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    for i in range(count):
        place = folder / f"{i // 1000:04d}"
        place.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)
        image.save(place / f"{i:07d}.png", compress_level=1)
        (place / f"{i:07d}.txt").write_text(f"picture number {i}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), args.files)
        began = time.process_time()
        source = Folder(name, captions=True)
        listed = time.process_time()
        print(f"{len(source):,} files: listing {listed - began:.1f} s", flush=True)
        report = check_data(source)
        print(f"looking {time.process_time() - listed:.1f} s")
    print(f"{report.images:,} images, {len(report.alike)} groups that look alike")


if __name__ == "__main__":
    main()
