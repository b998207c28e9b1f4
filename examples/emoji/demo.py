"""Text to pictures with the shipped emoji model: `make demo`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch.images import image_grid

PROMPTS = [
    "red apple",
    "sun with face",
    "sailboat",
    "frog",
    "woman astronaut medium skin tone",
    "flag Japan",
    # combinations that were held out of the training
    "HELD OUT",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("muse-demo.png"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.perf_counter()
    print("drawing ...", flush=True)
    muse = Muse.from_pretrained("emoji")
    images = muse(PROMPTS, seeds=args.seed)
    image_grid(images, columns=4, labels=PROMPTS).save(args.out)
    print(f"{len(images)} pictures in {time.perf_counter() - start:.1f} s: {args.out.resolve()}")
    print('your own prompt:  .venv/bin/muse generate "cat with a red hat" --out cat.png')


if __name__ == "__main__":
    main()
