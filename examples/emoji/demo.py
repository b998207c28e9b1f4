"""Text to pictures with the shipped emoji model: `make demo`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch.images import image_grid, save_png
from muse_maskgit_pytorch.provenance import attach_to_sheet

KNOWN = [
    "red apple",
    "sun with face",
    "sailboat",
    "octopus",
    "cactus",
    "woman cook light skin tone",
    "Japan",
    "rocket",
]
# held out of the training: these words were never seen together
NEW = [
    "woman astronaut dark skin tone",
    "man superhero medium skin tone",
    "woman pilot dark skin tone",
    "detective light skin tone",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("muse-demo.png"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.perf_counter()
    print("drawing ...", flush=True)
    muse = Muse.from_pretrained("emoji")
    images = muse([*KNOWN, *NEW], seeds=args.seed)
    labels = [*KNOWN, *(f"new: {prompt}" for prompt in NEW)]
    sheet = image_grid(images, columns=4, labels=labels)
    attach_to_sheet(sheet, images)  # says in the file how its pictures were drawn
    save_png(sheet, args.out)
    print(f"{len(images)} pictures in {time.perf_counter() - start:.1f} s: {args.out.resolve()}")
    print('your own prompt:  .venv/bin/muse generate "man farmer dark skin tone" --out mine.png')


if __name__ == "__main__":
    main()
