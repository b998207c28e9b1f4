"""A few real photographs as a training set: random square crops of what two packages carry.

    python examples/photos.py --out data/photos

scikit-learn's china and scikit-image's coffee, rocket, motorcycle, retina and Hubble field are cut
into training crops of many sizes, half of them with their colour channels exchanged, for six
photographs do not hold all colours (the first try without this drew green eyes red); flower,
astronaut and the cat Chelsea are left whole, to be reconstructed by a tokenizer that never saw
them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import skimage
import sklearn
import torch
from PIL import Image

from muse_maskgit_pytorch.images import read_image

SKLEARN = Path(str(sklearn.__file__)).parent / "datasets" / "images"
SKIMAGE = Path(str(skimage.__file__)).parent / "data"
TRAIN = [
    SKLEARN / "china.jpg",
    SKIMAGE / "coffee.png",
    SKIMAGE / "rocket.jpg",
    SKIMAGE / "motorcycle_left.png",
    SKIMAGE / "retina.jpg",
    SKIMAGE / "hubble_deep_field.jpg",
]
HELDOUT = [SKLEARN / "flower.jpg", SKIMAGE / "astronaut.png", SKIMAGE / "chelsea.png"]


def crops(photo: Image.Image, count: int, size: int, generator: torch.Generator):
    """Random squares of the photograph, of ``size`` pixels up to its shorter side, scaled down."""
    most = min(photo.size)
    for _ in range(count):
        # small crops show detail, large ones composition
        share, x, y = torch.rand(3, generator=generator).tolist()
        side = round(size * (most / size) ** share) if most > size else most
        left, top = round(x * (photo.width - side)), round(y * (photo.height - side))
        crop = photo.crop((left, top, left + side, top + side))
        crop = crop.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
        if torch.rand((), generator=generator) < 0.5:
            order = torch.randperm(3, generator=generator).tolist()
            crop = Image.merge("RGB", [crop.split()[channel] for channel in order])
        yield crop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/photos")
    parser.add_argument("--size", type=int, default=128, help="side of the training crops")
    parser.add_argument("--count", type=int, default=400, help="crops of each photograph")
    args = parser.parse_args()
    train, heldout = Path(args.out) / "train", Path(args.out) / "heldout"
    train.mkdir(parents=True, exist_ok=True)
    heldout.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for path in TRAIN:
        for number, crop in enumerate(crops(read_image(path), args.count, args.size, generator)):
            crop.save(train / f"{path.stem}-{number:04d}.png")
    for path in HELDOUT:
        read_image(path).save(heldout / f"{path.stem}.png")
    print(f"{len(TRAIN) * args.count} crops in {train}, {len(HELDOUT)} photographs in {heldout}")


if __name__ == "__main__":
    main()
