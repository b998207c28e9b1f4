"""The edits: pictures drawn on canvases that are partly filled (paper 3.3).

Every edit is the one sampler on the tokens of a given picture, some of them masked: those under a
mask (`inpaint`), beyond the picture's edges (`outpaint`), a share drawn at random (`vary`), or a
few at a time, again and again (`free`). With a super-resolution stage, the picture is tokenised at
both sizes and masked at both; the low resolution is drawn first, the high one from it (3.3.1).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from ..arguments import plain, real, shown, whole
from ..files import digest_pixels
from ..geometry import ImageSize
from ..images import resize
from ..muse import Muse
from ..request import Drawn, Request
from ..sampling import Callback, sample_tokens, stream_seed
from ..structures import SampleStep
from .pixels import (
    LARGEST,
    Mask,
    Picture,
    composite,
    count_of,
    fitted,
    fitted_mask,
    listed,
    spread,
    windows,
)


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

    What lies under the mask is not looked at: it is filled in from its surroundings before the
    picture is tokenised. A token is drawn anew if any of its pixels is to be repainted, and so are
    its neighbours, whose ids would be influenced by the filling.

    Args:
        muse: the model.
        pictures: B of them, or one for all; scaled and cropped to the model's size, with a
            warning.
        texts: what the whole pictures should show: B, or one for all; None or "" for no caption.
        masks: True where to repaint, of the pictures' sizes; B, or one for all.
        blend: return kept pixels exactly (`composite`); if False, as the tokenizer decodes them.
        feather: pixels of the repainted part over which the seam is smoothed.
        grow: how many pixels around the mask have their tokens drawn anew.
        **arguments: as in calling the model: ``negative_texts``, ``seeds``, ``base_options``,
            ``superres_options``, ``preset``, ``image_size``, ``callback``.

    Returns:
        B pictures of the model's size.

    Raises:
        ValueError: pictures, masks and texts whose numbers differ; pixels that are not numbers in
            [0, 1]; a mask that repaints nothing, or is not boolean.
    """
    feather, grow = _seam(feather, grow)
    if not isinstance(blend, bool):
        raise ValueError(f"blend must be True or False, not {shown(blend)}")
    count_of(pictures, "pictures")
    pictures = listed(pictures)  # once, for the pictures and their masks
    edit = _Edit.of(muse, pictures, texts, count_of(masks, "masks"), **arguments)
    repaint = edit.masks(pictures, masks)
    images = edit.repainted(edit.images, repaint, feather if blend else None, grow)
    settings = {"blend": blend, "feather": feather, "grow": grow}
    return edit.finished(images, "inpaint", **settings, masks=[_digest(mask) for mask in repaint])


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

    The model draws windows of its own size, each overlapping what is already there as far as
    possible: it only ever sees the geometry it was trained on, however large the picture grows.

    Args:
        muse: the model.
        pictures: as in `inpaint`, but scaled by their shorter side, not cropped.
        texts: as in `inpaint`; every window is drawn with the same one.
        left: pixels to add on that side, counted at the model's size.
        top: likewise.
        right: likewise.
        bottom: likewise.
        aspect: width / height to reach instead, by adding equally on two sides.
        feather: as in `inpaint`.
        grow: as in `inpaint`.
        **arguments: as in `inpaint`. If a callback stops, the remaining windows stay black.

    Returns:
        B larger pictures that contain the given pixels unchanged.

    Raises:
        ValueError: as `inpaint`; nothing to add, or both sides and an aspect.
    """
    feather, grow = _seam(feather, grow)
    names = ("left", "top", "right", "bottom")
    sides = [
        whole(name, side, 0) for name, side in zip(names, (left, top, right, bottom), strict=True)
    ]
    left, top, right, bottom = sides
    if aspect is not None:
        aspect = real("aspect", aspect, 1 / LARGEST, LARGEST)
        if any(sides):
            raise ValueError(f"aspect {aspect} and sides {sides} are both given: choose one")
    edit = _Edit.of(muse, pictures, texts, crop=False, **arguments)
    height, width = edit.images.shape[-2:]
    if aspect is not None:
        wide = max(0, round(height * aspect) - width)
        high = 0 if wide else max(0, round(width / aspect) - height)
        left, top = wide // 2, high // 2
        right, bottom = wide - left, high - top
    if not (left or top or right or bottom):
        raise ValueError("nothing to add: give left, top, right or bottom in pixels, or an aspect")
    if max(size := (left + width + right, top + height + bottom)) > LARGEST:
        raise ValueError(f"{size[0]} x {size[1]} pixels: a side may have at most {LARGEST}")

    images = F.pad(edit.images, (left, right, top, bottom))
    repaint = F.pad(torch.zeros_like(edit.images[:1, :1]), (left, right, top, bottom), value=1) > 0
    for number, window in enumerate(windows(repaint[0, 0], edit.request.image_size)):
        part = repaint[window].expand(len(images), -1, -1, -1)
        stream = f"window {number}" if number else ""
        images[window] = edit.repainted(images[window], part, feather, grow, stream)
        repaint[window] = False
        if edit.stops:
            break
    added = {
        "left": left,
        "top": top,
        "right": right,
        "bottom": bottom,
        "window": [*edit.request.image_size],
    }
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
            what the model draws with the same seed and text, with nothing left of the picture.
        **arguments: as in `inpaint`.

    Raises:
        ValueError: as `inpaint`; a strength outside [0, 1].
    """
    given = plain(strength)
    given = given if isinstance(given, list) else [given]
    given = [real("strength", share, 0, 1) for share in given]
    edit = _Edit.of(muse, pictures, texts, len(given), **arguments)
    strengths = given * (len(edit.request) if len(given) == 1 else 1)
    grid = muse.base.geometry.grid(muse.sizes(edit.request.image_size)["base"])
    ranks = torch.stack([_shuffled(math.prod(grid), seed) for seed in edit.request.seeds])
    wanted = torch.tensor([round(share * math.prod(grid)) for share in strengths])[:, None]
    cells = (ranks < wanted).view(-1, 1, *grid).to(edit.images.device)
    drawn = edit.draw(edit.canvases(edit.images, cells))
    same = (wanted == 0).to(drawn.device).view(-1, 1, 1, 1)
    images = torch.where(same, edit.images, drawn)
    return edit.finished(images, "vary", strength=strengths)


MOST = 10_000  # iterations of `free`


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
    text; at the end the super-resolution stage draws the picture from these tokens and the text.
    The defaults are the paper's, which also shows iterations 50 and 75.

    Args:
        muse: the model.
        pictures: as in `inpaint`.
        texts: what the pictures should show.
        at: iterations after which pictures are drawn, rising; the last one is the end.
        share: of the tokens that are drawn anew in each iteration, in (0, 1].
        cond_scale: guidance; the paper's t = 4 is 1 + t here.
        top_k: number of tokens to choose from; 0 means all.
        **arguments: as in `inpaint`. Of ``base_options`` the temperature, the limits of the token
            choice and the seeds are used. The callback sees a step for each iteration; returning
            True makes it the last one.

    Returns:
        for each iteration of ``at``, B pictures.

    Raises:
        ValueError: as `inpaint`; an empty or falling ``at``, a share outside (0, 1].
    """
    at = plain(at)
    if not isinstance(at, list) or not at:
        raise ValueError(f"at must be a list of rising iterations, not {shown(at)}")
    at = [whole("at", iteration, 1, MOST) for iteration in at]
    if at != sorted(set(at)):
        raise ValueError(f"at must be rising iterations, not {shown(at)}")
    share = real("share", share, 0, 1)
    if not share:
        raise ValueError("share must be above 0: a part of the tokens is drawn in each iteration")
    edit = _Edit.of(muse, pictures, texts, **arguments)
    base, size = muse.base, muse.sizes(edit.request.image_size)["base"]
    options = edit.request.options["base"].replace(
        timesteps=1,
        cond_scale=cond_scale,
        guidance_schedule="constant",
        top_k=top_k,
        policy="random",  # one step draws everything that is masked: no order
        temperature_end=None,
    )
    text = base.embed_texts(edit.request.prompts, allow_empty=True)
    denoiser = base.denoiser(text, options, edit.request.negatives, image_size=size)
    canvases = edit.canvases(edit.images, torch.zeros_like(edit.images[:, :1]).bool())
    if muse.superres is not None:  # nothing of it is kept: it follows from the base's tokens
        canvases["superres"].fill_(muse.superres.transformer.mask_id)
    ids = canvases["base"]
    count = max(1, round(share * ids.shape[1]))
    results = []
    for iteration in range(1, at[-1] + 1):
        seeds = [stream_seed(seed, f"iteration {iteration}") for seed in edit.request.seeds]
        chosen = torch.stack([_shuffled(ids.shape[1], seed) for seed in seeds]) < count
        canvas = ids.masked_fill(chosen.to(ids.device), base.transformer.mask_id)
        now, grid = options.replace(seeds=seeds), base.geometry.grid(size)
        ids = sample_tokens(denoiser, canvas, now, edit.watch, grid)
        if iteration in at or edit.stops:
            drawn = edit.draw({**canvases, "base": ids})
            used = {**edit.request.options, "base": options}
            settings = {"iteration": iteration, "share": share}
            ended = replace(edit, request=replace(edit.request, options=used))
            results.append(ended.finished(drawn, "free", **settings))
        if edit.stops:
            break
    return results


# What the edits share -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Edit:
    """One call: B pictures, and the request by which they are drawn.

    Attributes:
        images: the pictures, scaled.
        request: prompts, options and size; its canvases and settings are added on the way. The
            size is that of the pictures, except for outpainting.
        stops: steps at which the callback said to stop.
    """

    muse: Muse
    images: Float[Tensor, "B 3 H W"]
    request: Request
    callback: Callback | None
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
        image_size: ImageSize | None = None,
        callback: Callback | None = None,
        **arguments: Any,
    ) -> _Edit:
        """Check and complete what an edit was called with.

        Args:
            muse, pictures, texts: as in `inpaint`.
            number: how many further things were given, one for each picture.
            crop: make pictures as large as what the model draws; else only as their shorter side.
            image_size, callback: as in calling the model.
            **arguments: likewise.
        """
        given = plain("" if texts is None else texts)
        texts = given if isinstance(given, list) else [given]
        if not texts:
            raise ValueError("texts is empty: give one for all pictures, one each, or None")
        negatives = arguments.get("negative_texts")
        negatives = [negatives] if isinstance(negatives, str) else negatives
        seeds = plain(arguments.get("seeds"))
        counts = {
            "pictures": count_of(pictures, "pictures"),
            "texts": len(texts),
            "negative_texts": len(negatives) if isinstance(negatives, Sequence) else 1,
            "seeds": len(seeds) if isinstance(seeds, Sequence) else 1,
            "masks or strengths": number,
        }
        batch = max(counts.values())
        wrong = [f"{n} {name}" for name, n in counts.items() if n not in (1, batch)]
        if wrong:
            raise ValueError(
                f"{' and '.join(wrong)} for {batch} pictures: give one for all, or one each"
            )
        texts = [*texts] * (batch // len(texts))
        request = muse.request(texts, image_size=image_size, canvases={}, **arguments)
        scaled = [fitted(picture, request.image_size, crop) for picture in listed(pictures)]
        if len({image.shape for image in scaled}) > 1:
            raise ValueError("the pictures differ in width / height: edit them one by one")
        images = torch.stack(scaled).to(muse.device)
        return cls(muse, images.repeat(batch // len(images), 1, 1, 1), request, callback)

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
        sizes = self.muse.sizes(self.request.image_size)
        for name, stage in self.muse.stages.items():
            ids = stage.vae.encode_to_ids(resize(images, sizes[name]))
            # also enlarges: the cells of a coarser grid are whole tokens of a finer one
            masked = F.adaptive_max_pool2d(repaint.float(), ids.shape[1:])[:, 0] > 0
            canvases[name] = ids.masked_fill(masked, stage.transformer.mask_id).flatten(1)
        return canvases

    def draw(
        self, canvases: dict[str, Int[Tensor, "B N"]], stream: str = ""
    ) -> Float[Tensor, "B 3 H W"]:
        """The cascade on canvases; each part of an edit draws from a stream of its own."""
        request = replace(self.request, canvases=canvases).in_stream(stream)
        return self.muse.draw(request, self.watch).images.float()

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
        stream: str = "",
    ) -> Float[Tensor, "B 3 H W"]:
        """Images with their masked part drawn anew; not blended if ``feather`` is None."""
        wide = F.max_pool2d(repaint.float(), 2 * grow + 1, stride=1, padding=grow) > 0
        drawn = self.draw(self.canvases(spread(images, ~repaint), wide), stream)
        return drawn if feather is None else composite(images, drawn, repaint, feather)

    def masks(
        self, pictures: Picture | Sequence[Picture], masks: Mask | Sequence[Mask]
    ) -> Bool[Tensor, "B 1 H W"]:
        """Masks, scaled and cropped as their pictures were."""
        given = [masks] if isinstance(masks, Tensor) and masks.ndim == 2 else list(masks)
        batch, sources = len(self.request), listed(pictures)
        pairs = zip(given * (batch // len(given)), sources * (batch // len(sources)), strict=True)
        size = self.request.image_size
        repaint = torch.stack([fitted_mask(mask, picture, size) for mask, picture in pairs])
        if not repaint.flatten(1).any(dim=1).all():
            raise ValueError("a mask repaints nothing: it is True nowhere in the picture")
        if repaint.flatten(1).all(dim=1).any():
            warnings.warn("a mask repaints the whole picture: nothing of it is kept", stacklevel=3)
        return repaint[:, None].to(self.images.device)

    def finished(
        self, images: Float[Tensor, "B 3 H W"], kind: str, **settings: Any
    ) -> list[Image.Image]:
        """Pictures with the record of the edit, unless the callback cut it short."""
        edit = {"kind": kind, **settings, "pictures": [_digest(image) for image in self.images]}
        request = replace(self.request, edit=edit)
        return self.muse.pictures(Drawn(images, request, images, stopped=bool(self.stops)))


def _shuffled(count: int, seed: int) -> Int[Tensor, " n"]:
    """The numbers below ``count`` in an order given by the seed."""
    generator = torch.Generator("cpu").manual_seed(stream_seed(seed, "cells"))
    return torch.randperm(count, generator=generator, device="cpu")


def _digest(tensor: Tensor) -> str:
    """A short name of a picture's or a mask's pixels, as 8-bit numbers."""
    return digest_pixels((tensor.float() * 255).round().to(torch.uint8))


def _seam(feather: int, grow: int) -> tuple[int, int]:
    """Both, checked."""
    return whole("feather", feather, 0, 1024), whole("grow", grow, 0, 1024)
