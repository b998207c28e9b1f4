"""Editing: pictures drawn on canvases that are partly filled (paper 3.3), and what frames them.

Every edit is the one sampler on the tokens of a given picture, some of them masked: those under a
mask (`inpaint`), beyond the picture's edges (`outpaint`), a share drawn at random (`vary`), or a
few at a time, again and again (`free`). With a super-resolution stage the picture is tokenised at
both sizes and masked at both; the low resolution is drawn first, the high one from it (3.3.1).

A mask is a boolean tensor (H, W), True where to repaint. Mask images come in two conventions, which
nothing in the file tells apart: `white` and `transparent` say which is meant.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageOps
from torch import Tensor

from .images import to_pil, to_tensor
from .maskgit import ImageSize, MaskGit
from .muse import Muse
from .sampling import per_row, sample_tokens
from .structures import SampleOptions, SampleStep

Picture = Image.Image | Float[Tensor, "3 H W"]  # a tensor is RGB in [0, 1]
Mask = Bool[Tensor, "H W"]

SEED_STEP = 1_000_003  # from one part of an edit to the next: far apart, so that no seeds meet

LARGEST = 16_384  # pixels of a side, to outpaint up to


# Masks ----------------------------------------------------------------------------------------


def white(mask: Image.Image) -> Mask:
    """A mask image whose white is repainted and whose black is kept; grey counts as the nearer.

    What is transparent in it is kept: white strokes on an empty layer do.
    """
    light = to_tensor(mask).mean(dim=0) >= 0.5
    return light & ~transparent(mask) if mask.has_transparency_data else light


def transparent(mask: Image.Image) -> Mask:
    """A mask image whose transparent parts are repainted and whose opaque ones are kept.

    The picture itself may be the mask, with what is to be repainted erased.

    Raises:
        ValueError: an image without transparency.
    """
    if not mask.has_transparency_data:
        raise ValueError(
            f"the mask image (mode {mask.mode}) has no transparency: if its white is to be "
            "repainted, say so with white()"
        )
    return torch.from_numpy(np.array(mask.convert("RGBA").getchannel("A"))) < 128


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


# The edits ------------------------------------------------------------------------------------


def inpaint(
    muse: Muse,
    pictures: Picture | Sequence[Picture],
    texts: Sequence[str] | str | None,
    masks: Mask | Sequence[Mask],
    *,
    blend: bool = True,
    feather: int = 8,
    grow: int = 8,
    **arguments: Any,
) -> list[Image.Image]:
    """Repaint parts of pictures (3.3.1).

    What lies under the mask is not looked at: it is filled with its surroundings before the
    picture is tokenised. A token is drawn anew if any of its pixels is to be repainted, and so are
    those beside, of which the tokenizer thinks what the filling suggests.

    Args:
        muse: the model.
        pictures: B of them, or one for all; scaled and cropped to the model's size, and said.
        texts: what the whole pictures are to show: B, or one for all; None or "": no caption.
        masks: True where to repaint, of the pictures' sizes; B, or one for all.
        blend: give kept pixels back exactly (`composite`); False: as the tokenizer decodes them.
        feather: pixels of the repainted part over which the seam is smoothed.
        grow: how many pixels around the mask have their tokens drawn anew.
        **arguments: as in calling the model: ``negative_texts``, ``seeds``, ``base_options``,
            ``superres_options``, ``preset``, ``image_size``, ``callback``.

    Returns:
        B pictures of the model's size.

    Raises:
        ValueError: pictures, masks and texts of different numbers; pixels that are not numbers in
            [0, 1]; a mask that repaints nothing, or is not boolean.
    """
    _check_seam(feather, grow)
    edit = _Edit.of(muse, pictures, texts, _count(masks, "masks"), **arguments)
    repaint = edit.fitted_masks(pictures, masks)
    images = edit.repainted(edit.images, repaint, feather if blend else None, grow)
    facts = {"blend": blend, "feather": feather, "grow": grow}
    return edit.finished(images, "inpaint", **facts, masks=[_digest(mask) for mask in repaint])


def outpaint(
    muse: Muse,
    pictures: Picture | Sequence[Picture],
    texts: Sequence[str] | str | None,
    *,
    left: int = 0,
    top: int = 0,
    right: int = 0,
    bottom: int = 0,
    aspect: float | None = None,
    feather: int = 8,
    grow: int = 8,
    **arguments: Any,
) -> list[Image.Image]:
    """Continue pictures beyond their edges (3.3.1), by any amount.

    The model draws windows of its own size, each over what is already there as far as can be: so
    it never sees another geometry than it was trained on, however large the picture grows.

    Args:
        muse: the model.
        pictures: as in `inpaint`, but scaled by their shorter side, not cropped.
        texts: as in `inpaint`; every window is drawn with the same one.
        left: pixels to add there, counted at the model's size.
        top: likewise.
        right: likewise.
        bottom: likewise.
        aspect: width / height to reach instead, by adding equally on two sides.
        feather: as in `inpaint`.
        grow: as in `inpaint`.
        **arguments: as in `inpaint`. A callback that stops leaves the windows to come black.

    Returns:
        B larger pictures, the given pixels unchanged in them.

    Raises:
        ValueError: as `inpaint`; nothing to add, or both sides and an aspect.
    """
    _check_seam(feather, grow)
    edit = _Edit.of(muse, pictures, texts, crop=False, **arguments)
    height, width = edit.images.shape[-2:]
    sides = (left, top, right, bottom)
    if min(sides) < 0:
        raise ValueError(f"left, top, right, bottom {sides} must not be negative")
    if aspect is not None:
        if any(sides) or not 1 / LARGEST <= aspect <= LARGEST:
            raise ValueError(
                f"aspect {aspect} must be width / height, positive and sane, without further sides"
            )
        wide = max(0, round(height * aspect) - width)
        high = 0 if wide else max(0, round(width / aspect) - height)
        left, top = wide // 2, high // 2
        right, bottom = wide - left, high - top
    if not (left or top or right or bottom):
        raise ValueError("nothing to add: give left, top, right or bottom in pixels, or an aspect")
    if max(size := (left + width + right, top + height + bottom)) > LARGEST:
        raise ValueError(f"{size[0]} x {size[1]} pixels: a side may have {LARGEST}")

    images = F.pad(edit.images, (left, right, top, bottom))
    repaint = F.pad(torch.zeros_like(edit.images[:1, :1]), (left, right, top, bottom), value=1) > 0
    for part, window in enumerate(_windows(repaint[0, 0], edit.size)):
        here = repaint[window].expand(len(images), -1, -1, -1)
        images[window] = edit.repainted(images[window], here, feather, grow, part)
        repaint[window] = False
        if edit.stops:
            break
    added = {"left": left, "top": top, "right": right, "bottom": bottom, "window": [*edit.size]}
    return edit.finished(images, "outpaint", **added, feather=feather, grow=grow)


def vary(
    muse: Muse,
    pictures: Picture | Sequence[Picture],
    texts: Sequence[str] | str | None = None,
    *,
    strength: float | Sequence[float] = 0.5,
    **arguments: Any,
) -> list[Image.Image]:
    """Variations of pictures: a share of the tokens, chosen at random, is drawn anew.

    Args:
        muse: the model.
        pictures: as in `inpaint`.
        texts: as in `inpaint`.
        strength: that share, in [0, 1], one for all or one each; 0 returns the picture, 1 draws
            one that has nothing of it, as the model does with the same seed and text.
        **arguments: as in `inpaint`.

    Raises:
        ValueError: as `inpaint`; a strength beyond [0, 1].
    """
    given = list(strength) if isinstance(strength, Sequence) else [strength]
    if not all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in given):
        raise ValueError(f"strength must be in [0, 1], not {strength!r}")
    edit = _Edit.of(muse, pictures, texts, len(given), **arguments)
    strengths = [float(share) for share in per_row(strength, len(edit.texts), "strength")]
    grid = muse.base.grid(edit.stage_size("base"))
    ranks = torch.stack([_shuffled(math.prod(grid), seed) for seed in edit.seeds])
    wanted = torch.tensor([round(share * math.prod(grid)) for share in strengths])[:, None]
    cells = (ranks < wanted).view(-1, 1, *grid).to(edit.images.device)
    drawn = edit.draw(edit.canvases(edit.images, cells))
    same = (wanted == 0).to(drawn.device).view(-1, 1, 1, 1)
    images = torch.where(same, edit.images, drawn)
    return edit.finished(images, "vary", strength=strengths)


@torch.no_grad()
def free(
    muse: Muse,
    pictures: Picture | Sequence[Picture],
    texts: Sequence[str] | str,
    *,
    at: Sequence[int] = (100,),
    share: float = 0.08,
    cond_scale: float = 5.0,
    top_k: int = 3,
    **arguments: Any,
) -> list[list[Image.Image]]:
    """Edit whole pictures by a text alone, without a mask (3.3.2).

    In each iteration a few of the base stage's tokens, chosen at random, are drawn anew with the
    text; at the end the super-resolution stage draws the picture of these tokens and the text. The
    defaults are the paper's, which shows iterations 50 and 75, too.

    Args:
        muse: the model.
        pictures: as in `inpaint`.
        texts: what the pictures are to show.
        at: iterations after which pictures are drawn, rising; the last one is the end.
        share: of the tokens that are drawn anew in each iteration, in (0, 1].
        cond_scale: guidance; the paper's t = 4 is 1 + t here.
        top_k: the tokens to choose from; 0: all.
        **arguments: as in `inpaint`. Of ``base_options`` the temperature, the limits of the token
            choice and the seeds are used. The callback sees a step for each iteration; returning
            True makes it the last one.

    Returns:
        for each iteration of ``at``, B pictures.

    Raises:
        ValueError: as `inpaint`; an empty or falling ``at``, a share beyond (0, 1].
    """
    edit = _Edit.of(muse, pictures, texts, **arguments)
    if not _whole(at) or list(at) != sorted(set(at)) or at[0] < 1:
        raise ValueError(f"at must be a list of rising iterations from 1 on, not {at}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], not {share}")
    base, mask_id = muse.base, muse.base.transformer.mask_id
    options = edit.options["base"].replace(
        timesteps=1,
        cond_scale=cond_scale,
        guidance_schedule="constant",
        top_k=top_k,
        policy="random",  # one step draws all that is masked: no order
        temperature_end=None,
    )
    used = {**edit.options, "base": options}
    text = base.embed_texts(edit.texts, allow_empty=True)
    size = edit.stage_size("base")
    denoiser = base.denoiser(text, options, edit.negative_texts, image_size=size)
    blank = torch.zeros_like(edit.images[:, :1]).bool()
    canvases = edit.canvases(edit.images, blank)
    if muse.superres is not None:  # nothing of it is kept: it follows from the base's tokens
        canvases["superres"].fill_(muse.superres.transformer.mask_id)
    ids = canvases["base"]
    count = max(1, round(share * ids.shape[1]))
    stages = []
    for iteration in range(1, at[-1] + 1):
        now = _shifted(options, iteration)
        assert isinstance(now.seeds, list)
        chosen = torch.stack([_shuffled(ids.shape[1], seed) for seed in now.seeds]) < count
        canvas = ids.masked_fill(chosen.to(ids.device), mask_id)
        ids = sample_tokens(denoiser, canvas, now, edit.watch, base.grid(size))
        if iteration in at or edit.stops:
            drawn = edit.draw({**canvases, "base": ids})
            facts = {"iteration": iteration, "share": share}
            stages.append(replace(edit, options=used).finished(drawn, "free", **facts))
        if edit.stops:
            break
    return stages


# Pixels ---------------------------------------------------------------------------------------


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
    near = torch.zeros_like(grown)  # falls from 1 beside a kept pixel to 0, feather pixels away
    for _ in range(feather):
        grown = F.max_pool2d(grown, 3, stride=1, padding=1)
        near = near + grown / feather
    blended = (drawn + near * spread(given - drawn, kept)).clamp(0, 1)
    return torch.where(kept, given, blended)


# What the edits share -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Edit:
    """One call: B pictures, and all that decides how they are drawn.

    Attributes:
        images: the pictures, scaled.
        size: height and width that the model draws: theirs, but for outpainting.
        stops: steps at which the callback said to stop.
    """

    muse: Muse
    images: Float[Tensor, "B 3 H W"]
    size: tuple[int, int]
    texts: list[str]
    options: dict[str, SampleOptions]
    negative_texts: list[str] | None
    callback: Callable[[SampleStep], Any] | None
    stops: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        muse: Muse,
        pictures: Picture | Sequence[Picture],
        texts: Sequence[str] | str | None,
        number: int = 1,
        *,
        crop: bool = True,
        negative_texts: Sequence[str] | str | None = None,
        seeds: int | Sequence[int] | None = None,
        base_options: SampleOptions | None = None,
        superres_options: SampleOptions | None = None,
        preset: str | None = None,
        image_size: ImageSize | None = None,
        callback: Callable[[SampleStep], Any] | None = None,
    ) -> _Edit:
        """Check and complete what an edit was called with.

        Args:
            muse, pictures, texts: as in `inpaint`.
            number: how many further things were given, one for each picture.
            crop: make pictures as large as what the model draws; else only as their shorter side.
            **rest: as in `Muse.stages`.
        """
        texts = "" if texts is None else texts
        texts = [texts] if isinstance(texts, str) else list(texts)
        negatives = [negative_texts] if isinstance(negative_texts, str) else negative_texts
        counts = {
            "pictures": _count(pictures, "pictures"),
            "texts": len(texts),
            "negative_texts": 1 if negatives is None else len(negatives),
            "seeds": len(seeds) if isinstance(seeds, Sequence) else 1,
            "masks or strengths": number,
        }
        batch = max(counts.values())
        wrong = [f"{n} {name}" for name, n in counts.items() if n not in (1, batch)]
        if wrong:
            raise ValueError(
                f"{' and '.join(wrong)} for {batch} pictures: give one for all, or each"
            )
        size = list(_stages(muse).values())[-1].pixels(image_size)
        fitted = [_fitted(picture, size, crop) for picture in _listed(pictures)]
        if len({image.shape for image in fitted}) > 1:
            raise ValueError("the pictures differ in width / height: edit them one by one")
        images = torch.stack(fitted).to(muse.device)
        return cls(
            muse=muse,
            images=images.repeat(batch // len(images), 1, 1, 1),
            size=size,
            texts=texts * (batch // len(texts)),
            options=muse.seeded_options(batch, seeds, base_options, superres_options, preset),
            negative_texts=None if negatives is None else [*negatives] * (batch // len(negatives)),
            callback=callback,
        )

    @property
    def seeds(self) -> list[int]:
        seeds = self.options["base"].seeds
        assert isinstance(seeds, list)
        return seeds

    def stage_size(self, name: str) -> tuple[int, int]:
        """Height and width of a stage's pictures."""
        if name == "base" and self.muse.superres is not None:
            return self.muse.superres.cond_pixels(self.size)
        return self.size

    @torch.no_grad()
    def canvases(
        self, images: Float[Tensor, "B 3 H W"], repaint: Bool[Tensor, "B 1 h w"]
    ) -> dict[str, Int[Tensor, "B N"]]:
        """The tokens of images at the size of each stage, masked where anything is repainted.

        Args:
            images: of the final size.
            repaint: one value for each pixel, or for each token of the base.
        """
        canvases = {}
        for name, stage in _stages(self.muse).items():
            ids = stage.vae.encode_to_ids(F.interpolate(images, self.stage_size(name), mode="area"))
            # also enlarges: the cells of a coarser grid are whole tokens of a finer one
            masked = F.adaptive_max_pool2d(repaint.float(), ids.shape[1:])[:, 0] > 0
            canvases[name] = ids.masked_fill(masked, stage.transformer.mask_id).flatten(1)
        return canvases

    def draw(
        self, canvases: dict[str, Int[Tensor, "B N"]], part: int = 0
    ) -> Float[Tensor, "B 3 H W"]:
        """The cascade on canvases; each part of an edit has noise of its own."""
        options = {name: _shifted(options, part) for name, options in self.options.items()}
        images = self.muse.stages(
            self.texts,
            negative_texts=self.negative_texts,
            base_options=options["base"],
            superres_options=options.get("superres"),
            image_size=self.size,
            canvases=canvases,
            callback=self.watch,
        )
        return images[-1].float()

    def watch(self, step: SampleStep) -> bool:
        """The callback, and whether it ever stops."""
        stop = bool(self.callback and self.callback(step))
        if stop:
            self.stops.append(step.step)
        return stop

    def repainted(
        self,
        images: Float[Tensor, "B 3 H W"],
        repaint: Bool[Tensor, "B 1 H W"],
        feather: int | None,
        grow: int,
        part: int = 0,
    ) -> Float[Tensor, "B 3 H W"]:
        """Images with their masked part drawn anew; None as ``feather``: not blended."""
        wide = F.max_pool2d(repaint.float(), 2 * grow + 1, stride=1, padding=grow) > 0
        drawn = self.draw(self.canvases(spread(images, ~repaint), wide), part)
        return drawn if feather is None else composite(images, drawn, repaint, feather)

    def fitted_masks(
        self, pictures: Picture | Sequence[Picture], masks: Mask | Sequence[Mask]
    ) -> Bool[Tensor, "B 1 H W"]:
        """Masks, scaled and cropped as their pictures were."""
        given = [masks] if isinstance(masks, Tensor) and masks.ndim == 2 else list(masks)
        batch, sources = len(self.texts), _listed(pictures)
        pairs = zip(given * (batch // len(given)), sources * (batch // len(sources)), strict=True)
        fitted = torch.stack([_fitted_mask(mask, picture, self.size) for mask, picture in pairs])
        if not fitted.flatten(1).any(dim=1).all():
            raise ValueError("a mask repaints nothing: it is True nowhere in the picture")
        if fitted.flatten(1).all(dim=1).any():
            warnings.warn("a mask repaints the whole picture: nothing of it is kept", stacklevel=3)
        return fitted[:, None].to(self.images.device)

    def finished(
        self, images: Float[Tensor, "B 3 H W"], kind: str, **facts: Any
    ) -> list[Image.Image]:
        """Pictures with the record of the edit, unless the callback cut it short."""
        if self.stops:
            return to_pil(images)
        edit = {"kind": kind, **facts, "pictures": [_digest(image) for image in self.images]}
        return self.muse.signed(images, self.texts, self.negative_texts, self.options, edit)


def _stages(muse: Muse) -> dict[str, MaskGit]:
    stages = {"base": muse.base, "superres": muse.superres}
    return {name: stage for name, stage in stages.items() if stage is not None}


def _windows(repaint: Bool[Tensor, "H W"], size: tuple[int, int]) -> Iterator[Any]:
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


def _shuffled(count: int, seed: int) -> Int[Tensor, " n"]:
    """The numbers below ``count`` in an order of the seed's."""
    # the sampler draws its noise from the seed itself
    generator = torch.Generator().manual_seed(seed ^ 0x5EED)
    return torch.randperm(count, generator=generator)


def _shifted(options: SampleOptions, part: int) -> SampleOptions:
    assert isinstance(options.seeds, list)
    return options.replace(seeds=[(seed + part * SEED_STEP) % 2**63 for seed in options.seeds])


def _listed(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    single = isinstance(pictures, Image.Image) or (
        isinstance(pictures, Tensor) and pictures.ndim == 3
    )
    return [pictures] if single else list(pictures)  # type: ignore[arg-type, list-item]


def _count(given: Any, name: str) -> int:
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


def _fitted(picture: Picture, size: tuple[int, int], crop: bool) -> Float[Tensor, "3 H W"]:
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
        whole = picture.detach().float().cpu()
    elif isinstance(picture, Image.Image):
        whole = to_tensor(picture)
    else:
        raise ValueError(f"a picture must be a PIL image or a tensor, not {type(picture).__name__}")
    if not whole.numel():
        raise ValueError("a picture has no pixels")
    given, wanted = (whole.shape[1], whole.shape[2]), size
    if not crop:
        scale = max(size[0] / given[0], size[1] / given[1])
        wanted = max(size[0], round(given[0] * scale)), max(size[1], round(given[1] * scale))
    if max(wanted) > LARGEST:
        raise ValueError(
            f"a picture of {given[1]} x {given[0]} pixels would become {wanted[1]} x {wanted[0]}: "
            f"a side may have {LARGEST}"
        )
    if given == wanted:
        return whole
    cropped = given[0] * wanted[1] != given[1] * wanted[0] and crop
    warnings.warn(
        f"a picture of {given[1]} x {given[0]} pixels is scaled to {wanted[1]} x {wanted[0]}"
        + (", and its margins are cut" if cropped else ""),
        stacklevel=5,
    )
    fitted = ImageOps.fit(to_pil(whole)[0], wanted[::-1], Image.Resampling.BICUBIC)
    return to_tensor(fitted)


def _fitted_mask(mask: Mask, picture: Picture, size: tuple[int, int]) -> Bool[Tensor, "H W"]:
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


def _digest(tensor: Tensor) -> str:
    """A short name of a picture's or a mask's pixels, as 8-bit numbers."""
    pixels = (tensor.float() * 255).round().to(torch.uint8).cpu().contiguous()
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()[:16]


def _whole(numbers: Any) -> bool:
    """Whether this is a list of whole numbers, and not empty."""
    listed = isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers) > 0
    return listed and all(isinstance(number, int) for number in numbers)


def _check_seam(feather: int, grow: int) -> None:
    for name, value in {"feather": feather, "grow": grow}.items():
        if not isinstance(value, int) or not 0 <= value <= 1024:
            raise ValueError(f"{name} must be 0 to 1024 whole pixels, not {value}")
