"""Sentences to pictures with the shipped model: `make demo`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch.images import image_grid, save_png
from muse_maskgit_pytorch.provenance import attach_to_sheet

SENTENCES = [
    "a red apple to the left of a sailboat on a light blue background",
    "three octopuses on a yellow background",
    "a fox in 3D style",
    "a big rocket above a small house on a dark blue background",
    "two cacti and a camel on an orange background in flat style",
    "a woman cook with dark skin tone",
    "a penguin in front of a castle",
    "a tiny strawberry on a pink background",
    "four butterflies in 3D style on a green background",
    "a bicycle below a rainbow",
    "a small owl, a candle and a slice of pizza",
    "a sunflower on a gradient from blue to pink",
]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="scenes", help="name or file of a Muse")
    parser.add_argument("--out", type=Path, default=Path("muse-demo.png"))
    parser.add_argument("--preset", help="of the model; its defaults unless given")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.perf_counter()
    print("drawing ...", flush=True)
    muse = Muse.from_pretrained(args.model)
    images = muse(SENTENCES, seeds=args.seed, preset=args.preset)
    sheet = image_grid(images, columns=4, labels=SENTENCES)
    attach_to_sheet(sheet, images)  # says in the file how its pictures were drawn
    save_png(sheet, args.out)
    print(f"{len(images)} pictures in {time.perf_counter() - start:.1f} s: {args.out.resolve()}")
    print('your own prompt:  .venv/bin/muse generate "two foxes above a drum" --out mine.png')


if __name__ == "__main__":
    main()
