"""Pixel work of the edits: masks, fitting pictures to sizes, filling, seams, windows.

A mask is a boolean tensor (H, W), True where to repaint. Mask images come in two conventions, and
nothing in the file tells which: `white` and `transparent` say which is meant.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image, ImageOps
from torch import Tensor

from ..images import read_image, read_with_alpha, to_pil, to_tensor

Picture = Image.Image | Float[Tensor, "3 H W"]  # a tensor is RGB in [0, 1]
Mask = Bool[Tensor, "H W"]

LARGEST = 16_384  # pixels of a side, to outpaint up to


# Masks ----------------------------------------------------------------------------------------


def white(mask: Image.Image) -> Mask:
    """A mask image whose white is repainted and whose black is kept; grey counts as the nearer.

    What is transparent in it is kept: white strokes on an empty layer do.
    """
    mask = read_with_alpha(mask)
    light = np.asarray(read_image(mask)).sum(axis=-1, dtype=np.uint16) * 2 >= 3 * 255
    if mask.has_transparency_data:
        light &= ~_clear(mask)
    return torch.from_numpy(light)


def transparent(mask: Image.Image) -> Mask:
    """A mask image whose transparent parts are repainted and whose opaque ones are kept.

    The picture itself may be the mask, with what is to be repainted erased.

    Raises:
        ValueError: an image without transparency.
    """
    mask = read_with_alpha(mask)
    if not mask.has_transparency_data:
        raise ValueError(
            f"the mask image (mode {mask.mode}) has no transparency: if its white is to be "
            "repainted, say so with white()"
        )
    return torch.from_numpy(_clear(mask))


def _clear(mask: Image.Image) -> np.ndarray:
    return np.asarray(mask.convert("RGBA").getchannel("A")) < 128


def box(size: tuple[int, int], left: int, top: int, right: int, bottom: int) -> Mask:
    """A mask that repaints a rectangle.

    Args:
        size: height and width of the picture, in pixels.
        left: its first column.
        top: its first row.
        right: the column behind its last.
        bottom: the row below its last.

    Raises:
        ValueError: an empty rectangle, or one that reaches beyond the picture.
    """
    height, width = size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"box {(left, top, right, bottom)} must be (left, top, right, bottom) with left < "
            f"right and top < bottom, inside the picture's {width} x {height} pixels"
        )
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


# Filling and seams ----------------------------------------------------------------------------


def spread(
    values: Float[Tensor, "B C H W"], known: Bool[Tensor, "B 1 H W"]
) -> Float[Tensor, "B C H W"]:
    """Known values as they are, and the others continued smoothly from them; 0 if none is known.

    Averages of the known values over ever larger cells fill the gaps (pull-push, Gortler et al.
    1996, The Lumigraph).
    """
    values = values.masked_fill(~known, 0)
    if known.all() or max(values.shape[-2:]) == 1:
        return values
    pool = dict(kernel_size=2, ceil_mode=True)
    there = F.avg_pool2d(known.to(values.dtype), **pool)
    coarse = spread(F.avg_pool2d(values, **pool) / there.clamp(min=1e-6), there > 0)
    return torch.where(known, values, F.interpolate(coarse, values.shape[-2:], mode="bilinear"))


def composite(
    given: Float[Tensor, "B 3 H W"],
    drawn: Float[Tensor, "B 3 H W"],
    repaint: Bool[Tensor, "B 1 H W"],
    feather: int = 8,
) -> Float[Tensor, "B 3 H W"]:
    """Kept pixels of ``given`` exactly, the others of ``drawn``, without a visible seam.

    What the tokenizer gets wrong at the edge of the kept pixels is continued into the others and
    taken off there, less and less over ``feather`` pixels; 0 takes nothing off.
    """
    kept = ~repaint
    grown = kept.to(drawn.dtype)
    near = torch.zeros_like(grown)  # falls from 1 next to a kept pixel to 0, feather pixels away
    for _ in range(feather):
        grown = F.max_pool2d(grown, 3, stride=1, padding=1)
        near = near + grown / feather
    blended = (drawn + near * spread(given - drawn, kept)).clamp(0, 1)
    return torch.where(kept, given, blended)


# Pictures of a size ---------------------------------------------------------------------------


def listed(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    """A list of pictures, opened as `read_image` does."""
    single = isinstance(pictures, Image.Image) or (
        isinstance(pictures, Tensor) and pictures.ndim == 3
    )
    many = [pictures] if single else list(pictures)  # type: ignore[arg-type, list-item]
    return [read_image(one) if isinstance(one, Image.Image) else one for one in many]  # type: ignore[bad-return]


def count_of(given: Any, name: str) -> int:
    """How many pictures or masks were given."""
    if name == "masks" and isinstance(given, Image.Image):
        raise ValueError(
            "a mask image does not say what it means: give white(mask) if its white is to be "
            "repainted, transparent(mask) if its transparent parts are"
        )
    if isinstance(given, Tensor):
        return 1 if given.ndim == {"pictures": 3, "masks": 2}[name] else len(given)
    if isinstance(given, Image.Image):
        return 1
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(
            f"{name} must be PIL images or tensors, not {type(given).__name__}: open files with "
            "Image.open"
        )
    if not given:
        raise ValueError(f"{name} is empty: give at least one")
    return len(given)


def fitted(picture: Picture, size: tuple[int, int], crop: bool) -> Float[Tensor, "3 H W"]:
    """A picture as a tensor that covers a size: exactly itself if it fits, else scaled."""
    if isinstance(picture, Tensor):
        if picture.ndim != 3 or len(picture) != 3 or not picture.is_floating_point():
            raise ValueError(
                "a picture must be a PIL image or a float tensor (3, H, W), not "
                f"{picture.dtype} {tuple(picture.shape)}"
            )
        if not bool(((picture >= 0) & (picture <= 1)).all()):  # NaN is neither
            raise ValueError(
                "a picture's pixels must be numbers in [0, 1]: divide bytes by 255, look for NaN"
            )
        picture = picture.detach().float().cpu()
        given = picture.shape[1], picture.shape[2]
    elif isinstance(picture, Image.Image):
        given = picture.height, picture.width
    else:
        raise ValueError(f"a picture must be a PIL image or a tensor, not {type(picture).__name__}")
    if 0 in given:
        raise ValueError("a picture has no pixels")
    wanted = size
    if not crop:
        scale = max(size[0] / given[0], size[1] / given[1])
        wanted = max(size[0], round(given[0] * scale)), max(size[1], round(given[1] * scale))
    if max(wanted) > LARGEST:
        raise ValueError(
            f"a picture of {given[1]} x {given[0]} pixels would become {wanted[1]} x {wanted[0]}: "
            f"a side may have at most {LARGEST}"
        )
    if given == wanted:
        return picture if isinstance(picture, Tensor) else to_tensor(picture)
    cropped = given[0] * wanted[1] != given[1] * wanted[0] and crop
    warnings.warn(
        f"a picture of {given[1]} x {given[0]} pixels is scaled to {wanted[1]} x {wanted[0]}"
        + (", and its margins are cut" if cropped else ""),
        stacklevel=5,
    )
    image = to_pil(picture)[0] if isinstance(picture, Tensor) else picture
    fitted = ImageOps.fit(image, wanted[::-1], Image.Resampling.BICUBIC)
    return to_tensor(fitted)


def fitted_mask(mask: Mask, picture: Picture, size: tuple[int, int]) -> Bool[Tensor, "H W"]:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError("a mask must be a boolean tensor (H, W), True where to repaint")
    if not mask.numel():
        raise ValueError("a mask has no pixels")
    own = picture.shape[-2:] if isinstance(picture, Tensor) else picture.size[::-1]
    pixels = Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255)
    if mask.shape != tuple(own):
        warnings.warn(
            f"a mask of {mask.shape[1]} x {mask.shape[0]} pixels is scaled to its picture's "
            f"{own[1]} x {own[0]}",
            stacklevel=4,
        )
        pixels = pixels.resize((own[1], own[0]), Image.Resampling.BOX)
    height, width = size
    pixels = ImageOps.fit(pixels, (width, height), Image.Resampling.BOX)  # thin lines stay
    return torch.from_numpy(np.array(pixels)) > 0


def windows(repaint: Bool[Tensor, "H W"], size: tuple[int, int]) -> Iterator[Any]:
    """Windows, as indices, that cover what is to be repainted, the best known first.

    They are half a window apart, and flush with the edges.
    """
    left = repaint.clone()

    def places(length: int, side: int) -> list[slice]:
        starts = {*range(0, length - side, max(1, side // 2)), length - side}
        return [slice(start, start + side) for start in sorted(starts)]

    def meet(one: Sequence[slice], other: Sequence[slice]) -> bool:
        return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))

    windows = list(itertools.product(*map(places, repaint.shape, size)))
    missing = [int(left[window].sum()) for window in windows]
    while any(missing):
        best = min((at for at, pixels in enumerate(missing) if pixels), key=missing.__getitem__)
        yield (..., *windows[best])
        left[windows[best]] = False
        for at, window in enumerate(windows):
            if missing[at] and meet(window, windows[best]):
                missing[at] = int(left[window].sum())
