"""Sizes: what a stage's pixels are in tokens, at its own and at the low resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .arguments import plain, ratio, shown, whole
from .transformer import MaskedTransformer
from .vqgan_vae import ImageTokenizer

ImageSize = int | tuple[int, int]  # side of a square, or height and width, in pixels
Size = tuple[int, int]  # height and width
MAX_ASPECT = 8  # of the longer side to the shorter


@dataclass(frozen=True)
class Geometry:
    """The trained sizes of a stage, and how others follow from them.

    Attributes:
        image_size: side of the trained images, in pixels.
        factor: pixels per token.
        cond_image_size: side of the low-resolution images; None for a base.
        cond_factor: their pixels per token.
        side_step: sides in tokens are multiples of it (`MaskedTransformer`).
    """

    image_size: int
    factor: int
    cond_image_size: int | None = None
    cond_factor: int = 1
    side_step: int = 1

    @classmethod
    def of(
        cls,
        vae: ImageTokenizer,
        image_size: int,
        cond_vae: ImageTokenizer | None = None,
        cond_image_size: int | None = None,
        side_step: int = 1,
    ) -> Geometry:
        """Check the sizes against the tokenizers.

        Raises:
            ValueError: a size that is not a multiple of its tokenizer's factor, a low resolution
                that is not lower.
        """
        vae.fmap_size(image_size)
        if cond_image_size is None:
            return cls(image_size, vae.factor, side_step=side_step)
        if not 0 < cond_image_size < image_size:
            raise ValueError(
                f"cond_image_size {cond_image_size} must be smaller than image_size {image_size}"
            )
        low = cond_vae or vae
        low.fmap_size(cond_image_size)
        return cls(image_size, vae.factor, cond_image_size, low.factor, side_step)

    def check(self, name: str, model: MaskedTransformer, vae: ImageTokenizer) -> None:
        """Refuse a transformer that was made for other tokens.

        Raises:
            ValueError: naming both numbers.
        """
        if model.num_tokens != vae.codebook_size:
            raise ValueError(
                f"{name} has num_tokens {model.num_tokens}, the tokenizer codebook_size "
                f"{vae.codebook_size}: they must be equal"
            )
        seq_len = math.prod(self.grid())
        if model.seq_len != seq_len:
            raise ValueError(
                f"{name} has seq_len {model.seq_len}, but image_size {self.image_size} with the "
                f"tokenizer's factor {self.factor} gives {seq_len} tokens: set seq_len={seq_len}"
            )

    def pixels(self, image_size: ImageSize | None = None) -> Size:
        """Height and width of an image: as trained, or of ``image_size``, checked.

        Raises:
            ValueError: a side that is not a multiple of the tokenizer's factor or, for
                super-resolution, whose low-resolution side is not a multiple of that of its own.
        """
        if image_size is None:
            return self.image_size, self.image_size
        given = plain(image_size)
        sides = given if isinstance(given, list) else [given] * 2
        if len(sides) != 2:
            raise ValueError(
                f"image_size must be a number or (height, width), not {shown(image_size)}"
            )
        sides = [whole("image_size", side, 1) for side in sides]
        step = self._step()
        for side in sides:
            if side % step:
                near = max(1, round(side / step)) * step
                raise ValueError(
                    f"image_size {image_size}: {side} is not a positive multiple of {step}, so it "
                    f"does not divide into whole tokens; the nearest size is {near}"
                )
        return sides[0], sides[1]

    def buckets(self, aspect_ratios: Sequence[Any]) -> tuple[Size, ...]:
        """Sizes of several shapes, each with about as many pixels as the trained square.

        Args:
            aspect_ratios: width : height of each, as a number or a text such as "3:2".

        Returns:
            height and width in pixels, in whole tokens, from wide to high.

        Raises:
            ValueError: none, or what is no ratio.
        """
        given = plain(aspect_ratios)
        if not isinstance(given, list) or not given:
            raise ValueError(
                f"aspect_ratios must be a list such as [3:2, 1:1, 2:3], not {shown(aspect_ratios)}"
            )
        ratios = [ratio("each of aspect_ratios", each, MAX_ASPECT) for each in given]
        step = self._step()
        sides = [
            (self.image_size / root, self.image_size * root) for root in map(math.sqrt, ratios)
        ]
        near = {tuple(max(1, round(side / step)) * step for side in pair) for pair in sides}
        return tuple(sorted((height, width) for height, width in near))

    def grid(self, image_size: ImageSize | None = None) -> Size:
        """Height and width of an image in tokens; see `pixels`."""
        height, width = self.pixels(image_size)
        return height // self.factor, width // self.factor

    def cond_pixels(self, image_size: ImageSize | None = None) -> Size:
        """Height and width of the low-resolution image that belongs to an image."""
        assert self.cond_image_size is not None
        height, width = self.pixels(image_size)
        size, low = self.image_size, self.cond_image_size
        return height * low // size, width * low // size

    def cond_grid(self, image_size: ImageSize | None = None) -> Size:
        """Height and width of the low-resolution image in tokens."""
        height, width = self.cond_pixels(image_size)
        return height // self.cond_factor, width // self.cond_factor

    def _step(self) -> int:
        """The smallest step in pixels that is whole tokens, and enough of them, everywhere."""
        factor = self.factor * self.side_step
        if self.cond_image_size is None:
            return factor
        low, own = Fraction(self.cond_image_size, self.image_size), self.cond_factor
        return math.lcm(factor, low.denominator * own // math.gcd(low.numerator, own))
