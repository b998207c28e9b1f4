"""Every kind of edit on pictures of the shipped model, as sheets: the pictures of docs/editing.md.

python examples/cookbook.py --out docs/pictures
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from muse_maskgit_pytorch import Muse, editing, words
from muse_maskgit_pytorch.images import image_grid, save_png

PAIR = "a red apple left of a sailboat on a light blue background"
FLOCK = "three butterflies on a green background"
FOX = "a fox on a yellow background, flat"
HOUSE = "a house on a red background in 3D style"
APPLE = "a red apple"
PROMPTS = [PAIR, FLOCK, FOX, HOUSE, APPLE]


def hidden(picture: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The picture with what is to be repainted in grey."""
    shown = picture.copy()
    shown.paste((150, 150, 150), box)
    return shown


def inpaint(muse: Muse, sources: dict[str, Image.Image]) -> Image.Image:
    box = (0, 0, 128, 256)
    texts = [PAIR.replace("a red apple", thing) for thing in ("a rocket", "a fox", "two lemons")]
    mask = editing.box((256, 256), *box)
    drawn = editing.inpaint(muse, sources[PAIR], [*texts, ""], mask, seeds=0)
    labels = ["the picture", "to repaint", *texts, "(no caption)"]
    return image_grid([sources[PAIR], hidden(sources[PAIR], box), *drawn], 6, labels)


def outpaint(muse: Muse, sources: dict[str, Image.Image]) -> Image.Image:
    names = [FLOCK, PAIR]
    wide = editing.outpaint(muse, [sources[n] for n in names], names, aspect=2.0, seeds=0)
    return image_grid(wide, 2, [f"{name}, aspect 2" for name in names])


def vary(muse: Muse, sources: dict[str, Image.Image]) -> Image.Image:
    strengths = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    drawn = editing.vary(muse, sources[FLOCK], FLOCK, strength=strengths, seeds=0)
    return image_grid(drawn, 6, [f"strength {strength}" for strength in strengths])


def free(muse: Muse, sources: dict[str, Image.Image]) -> Image.Image:
    at = [5, 10, 25, 50]
    rows = {
        FOX: FOX.replace("flat", "3D"),
        FLOCK: FLOCK.replace("green", "yellow"),
        APPLE: "a green apple",
    }
    given = [sources[name] for name in rows]
    stages = editing.free(muse, given, [*rows.values()], at=at, share=0.3, cond_scale=1.5, seeds=0)
    cells, labels = [], []
    for row, (name, wanted) in enumerate(rows.items()):
        cells += [sources[name], *(drawn[row] for drawn in stages)]
        labels += [name, *(f"{wanted}, {i}" for i in at)]
    return image_grid(cells, 1 + len(at), labels)


def emphasis(muse: Muse, sources: dict[str, Image.Image]) -> Image.Image:
    factors = [-1.0, 0.0, 1.0, 2.0, 4.0]
    drawn = [words.emphasise(muse, HOUSE, {"red": factor}, seeds=1)[0] for factor in factors]
    return image_grid(drawn, len(factors), [f"red x {factor}" for factor in factors])


def sizes(muse: Muse, sources: dict[str, Image.Image]) -> Image.Image:
    drawn = [
        muse(FLOCK, seeds=1, image_size=size)[0]
        for size in ((256, 256), (256, 384), (384, 256), (384, 384))
    ]
    return image_grid(drawn, 4, [f"{d.width} x {d.height}" for d in drawn])


SHEETS = [inpaint, outpaint, vary, free, emphasis, sizes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="scenes", help="name or file of a Muse")
    parser.add_argument("--out", type=Path, default=Path("runs/cookbook"))
    parser.add_argument("--only", nargs="*", default=[s.__name__ for s in SHEETS])
    args = parser.parse_args()
    muse = Muse.from_pretrained(args.model)
    sources = dict(zip(PROMPTS, muse(PROMPTS, seeds=1), strict=True))
    for sheet in SHEETS:
        if sheet.__name__ in args.only:
            print(save_png(sheet(muse, sources), args.out / f"edit-{sheet.__name__}.png"))


if __name__ == "__main__":
    main()
