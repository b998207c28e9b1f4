"""How a picture becomes what is trained on: its size, scaling, cropping, flipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps
from torch import Tensor

from ..geometry import Size
from ..images import Picture, Reduced, center_crop, largest_crop, read_reduced, to_tensor
from .order import draws

Crop = Literal["center", "random"]


@dataclass(frozen=True)
class View:
    """The way from a picture of any size to a tensor: a square, or the nearest of some shapes.

    `prepare` does what is the same in every epoch, and may be cached; `finish` the rest.

    Attributes:
        size: side of the square in pixels.
        crop: "center", the largest part that has the shape, or "random": a smaller one somewhere.
        crop_scale: smallest and largest side of a random crop, as a share of the largest part's
            (of a square: the picture's shorter side), each in (0, 1].
        flip: mirror half of the pictures, left to right.
        seed: of crops and flips, which depend on it and the sample's position alone.
        buckets: height and width of the shapes, in the place of the square
            (`Geometry.buckets`); none: all are squares.

    Raises:
        ValueError: a value outside of its range.
    """

    size: int
    crop: Crop = "center"
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = False
    seed: int = 0
    buckets: tuple[Size, ...] = ()

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

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Height and width of all shapes."""
        return self.buckets or ((self.size, self.size),)

    def wanted(self, bucket: int = 0) -> Size:
        """Height and width that a picture must cover for its smallest crop not to be enlarged."""
        height, width = self.sizes[bucket]
        share = 1.0 if self.crop == "center" else self.crop_scale[0]
        return math.ceil(height / share), math.ceil(width / share)

    def nearest(self, picture: tuple[int, int] | None) -> int:
        """Which of the `sizes` a picture gets: the nearest in shape, by the logarithm.

        Args:
            picture: its width and height; None: unknown, and so taken for a square.
        """
        width, height = picture or (1, 1)
        shape = math.log(width / height)
        away = [abs(math.log(size[1] / size[0]) - shape) for size in self.sizes]
        return away.index(min(away))

    def grouped(self, bucket: np.ndarray) -> dict[Size, Sequence[int]]:
        """Numbers of items by their size.

        Args:
            bucket: of each item which of the `sizes` it has.
        """
        if not self.buckets:
            return {self.sizes[0]: range(len(bucket))}
        found = {size: np.flatnonzero(bucket == place) for place, size in enumerate(self.sizes)}
        return {size: rows for size, rows in found.items() if len(rows)}  # type: ignore[misc]

    def scaled(self, size: int) -> View:
        """The same view at another size of the square, such as a low resolution."""
        buckets = tuple((h * size // self.size, w * size // self.size) for h, w in self.buckets)
        return replace(self, size=size, buckets=buckets)

    def prepare(self, image: Picture | Reduced, bucket: int = 0) -> Image.Image:
        """The centre at its size; for random crops the whole picture, without excess pixels.

        The latter is scaled down until its smallest crop has the size, and never scaled up.

        Args:
            image: as it is stored.
            bucket: which of the `sizes` it gets.
        """
        wanted = self.wanted(bucket)
        picture = image if isinstance(image, Reduced) else read_reduced(image, wanted)
        if self.crop == "center":
            return center_crop(picture, wanted)
        pairs = list(zip(wanted[::-1], picture.size, strict=True))
        ratio = max(low / side for low, side in pairs)
        if ratio >= 1:
            return picture.image
        width, height = (max(low, round(side * ratio)) for low, side in pairs)
        return picture.part((0, 0, *picture.size), (width, height))

    def finish(
        self, image: Image.Image, position: int | None, bucket: int = 0
    ) -> Float[Tensor, "3 H W"]:
        """The tensor of a prepared picture.

        Args:
            image: from `prepare`.
            position: of the sample in the training order; None: centre crop, not mirrored.
            bucket: as of `prepare`.

        Returns:
            float32 in [0,1].
        """
        size = self.sizes[bucket]
        if position is None or not self.is_random:
            return to_tensor(image, size)
        share, across, down, coin = draws(self.seed, position, 4)
        if self.crop == "random":
            low, high = self.crop_scale
            scale, largest = low + (high - low) * share, largest_crop(image.size, size)
            width, height = (max(1, round(side * scale)) for side in largest)
            left = int(across * (image.width - width + 1))
            top = int(down * (image.height - height + 1))
            image = image.crop((left, top, left + width, top + height))
        if self.flip and coin < 0.5:
            image = ImageOps.mirror(image)
        return to_tensor(image, size)
