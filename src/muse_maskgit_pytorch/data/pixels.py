"""How a picture becomes the square that is trained on: scaling, cropping, flipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from ..images import center_square, read_image, to_tensor
from .order import draws

Crop = Literal["center", "random"]


@dataclass(frozen=True)
class View:
    """The way from a picture of any size to a square tensor.

    `prepare` does what is the same in every epoch, and may be cached; `finish` the rest.

    Attributes:
        size: side of the square in pixels.
        crop: "center", or "random": a square of random side and place, scaled to ``size``.
        crop_scale: smallest and largest side of a random crop, as a share of the picture's
            shorter side, each in (0, 1].
        flip: mirror half of the pictures, left to right.
        seed: of crops and flips, which depend on it and the sample's position alone.

    Raises:
        ValueError: a value outside of its range.
    """

    size: int
    crop: Crop = "center"
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {self.size}")
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop must be center or random, not {self.crop!r}")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must rise within (0, 1], not {self.crop_scale}")

    @property
    def is_random(self) -> bool:
        return self.crop == "random" or self.flip

    def prepare(self, image: Image.Image) -> Image.Image:
        """The centre square at its size; for random crops the whole picture, without excess pixels.

        The latter is scaled down until its smallest crop has ``size`` pixels a side, and never
        scaled up.
        """
        image = read_image(image)
        if self.crop == "center":
            return center_square(image, self.size)
        short = math.ceil(self.size / self.crop_scale[0])
        if min(image.size) <= short:
            return image
        ratio = short / min(image.size)
        width, height = (max(short, round(side * ratio)) for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def finish(self, image: Image.Image, position: int | None) -> Float[Tensor, "3 S S"]:
        """The square of a prepared picture.

        Args:
            image: from `prepare`.
            position: of the sample in the training order; None: centre crop, not mirrored.

        Returns:
            float32 in [0,1].
        """
        if position is None or not self.is_random:
            return to_tensor(image, self.size)
        share, across, down, coin = draws(self.seed, position, 4)
        if self.crop == "random":
            low, high = self.crop_scale
            side = max(1, round(min(image.size) * (low + (high - low) * share)))
            left = int(across * (image.width - side + 1))
            top = int(down * (image.height - side + 1))
            image = image.crop((left, top, left + side, top + side))
        if self.flip and coin < 0.5:
            image = ImageOps.mirror(image)
        return to_tensor(image, self.size)
