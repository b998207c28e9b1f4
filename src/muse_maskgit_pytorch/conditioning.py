"""What a stage is conditioned on: captions and low-resolution images -> `Conditioning`.

One place for the text encoder, the empty prompt, long texts, guidance dropout, negative prompts
and the low resolution.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .arguments import as_tensor, as_text, plain, shown, whole
from .geometry import Geometry, ImageSize, Size
from .images import resize
from .structures import Conditioning, TextEmbeds
from .text import ClassLabels, LongTexts, TextCompute, TextEncoder
from .vqgan_vae import ImageTokenizer


@dataclass(frozen=True)
class Conditioner:
    """Makes the conditioning of one stage.

    Attributes:
        reader: gives what reads texts, when there are any.
        classes: names of the classes that stand for texts, if the stage has classes.
        geometry: of the stage.
        cond_vae: tokenizer of the low-resolution images; None for a base.
        device: of the results.
        compute: how texts are encoded.
    """

    reader: Callable[[], TextEncoder | ClassLabels]
    classes: tuple[str, ...] | None
    geometry: Geometry
    cond_vae: ImageTokenizer | None
    device: torch.device
    compute: TextCompute

    def embed_texts(
        self,
        texts: Sequence[str] | str | None,
        text_embeds: TextEmbeds | Float[Tensor, "B L E"] | None = None,
        *,
        allow_empty: bool = False,
        long: LongTexts = "windows",
    ) -> TextEmbeds:
        """Captions, or embeddings made elsewhere, as `TextEmbeds` on the device.

        An empty caption, where allowed, is no text at all, as after the training's dropout.
        Captions longer than the encoder reads are read in windows, or cut off, as in training,
        with a warning (`TextEncoder.encode`).

        Raises:
            ValueError: both or neither given, no texts, an empty one unless ``allow_empty``,
                embeddings that are no finite numbers.
        """
        if (texts is None) == (text_embeds is None):
            raise ValueError("give either texts or text_embeds")
        classes = self.classes
        if text_embeds is not None:
            text = check_embeds(text_embeds, allow_empty or classes == ()).to(self.device)
            return TextEmbeds(text.embeds.float(), text.mask)
        texts = check_texts(texts, allow_empty or classes == (), classes)
        compute = self.compute
        encoder = self.reader()
        if compute.precision != "float32":
            encoder = encoder.at(compute.precision)
        distinct = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        text = encoder.encode([*distinct], compute.device or self.device, long).to(self.device)
        if compute.free:
            encoder.free()
        seen = torch.tensor([bool(text.strip()) for text in distinct], device=self.device)
        text = TextEmbeds(text.embeds, text.mask & seen[:, None])
        if len(distinct) == len(texts):
            return text
        rows = torch.tensor([distinct[text] for text in texts], device=self.device)
        return TextEmbeds(text.embeds[rows], text.mask[rows])

    def encode_cond(
        self,
        cond_images: Float[Tensor, "B 3 Hc Wc"] | None,
        cond_ids: Int[Tensor, "B ..."] | None,
        images: Float[Tensor, "B 3 H W"] | None = None,
        image_size: ImageSize | None = None,
    ) -> Int[Tensor, "B M"] | None:
        """Low-resolution ids: given, or of low-resolution images, or of ``images`` scaled down.

        Raises:
            ValueError: low resolution missing or unexpected, or of another size.
        """
        low = self.geometry.cond_image_size
        if self.cond_vae is None:
            if cond_images is not None or cond_ids is not None:
                raise ValueError("cond_images or cond_ids given to a model without cond_image_size")
            return None
        size = self.geometry.cond_pixels(image_size)
        if cond_ids is not None:
            cond_ids = self.cond_vae.check_ids(cond_ids, "cond_ids").to(self.device).flatten(1)
            wanted = math.prod(self.geometry.cond_grid(image_size))
            if cond_ids.shape[1] != wanted:
                raise ValueError(
                    f"{cond_ids.shape[1]} cond_ids per image, cond_image_size {low} has {wanted}"
                )
            return cond_ids
        if cond_images is None:
            if images is None:
                raise ValueError(
                    f"super-resolution needs cond_images of {size[0]} x {size[1]} pixels, or "
                    "cond_ids"
                )
            cond_images = resize(images, size)
        cond_images = as_tensor("cond_images", cond_images)
        if cond_images.shape[-2:] != size:
            raise ValueError(
                f"cond_images are {tuple(cond_images.shape[-2:])} pixels, but must be {size} "
                f"(cond_image_size {low}): scale them"
            )
        return self.cond_vae.encode_to_ids(cond_images.to(self.device)).flatten(1)

    def dropped(
        self,
        text: TextEmbeds,
        cond: Int[Tensor, "B M"] | None,
        drop_prob: float,
        image_size: ImageSize | None = None,
    ) -> Conditioning:
        """For training: the text removed from a share of the rows (paper 2.7)."""
        keep = torch.rand(len(text.mask), device=self.device) >= drop_prob
        return Conditioning(text, cond, keep, *self._grids(cond, image_size))

    def branches(
        self,
        text: TextEmbeds,
        cond: Int[Tensor, "B M"] | None = None,
        negatives: Sequence[str] | None = None,
        image_size: ImageSize | None = None,
        guided: bool = True,
        written_out: bool = False,
    ) -> list[Conditioning]:
        """For sampling: with the text and, where there is guidance, with the negative one or none.

        Args:
            text: of B images.
            cond: their low-resolution ids.
            negatives: B negative prompts; empty ones stand for no text. If None, no text at all.
            image_size: if not the trained square.
            guided: whether the second branch is needed.
            written_out: whether no text is a text of which nothing is seen: the same with more
                work, for comparison.
        """
        grids = self._grids(cond, image_size)
        seen = torch.ones(len(text.mask), dtype=torch.bool, device=self.device)
        made = [Conditioning(text, cond, seen, *grids)]
        if guided:
            other = self._negative(negatives)
            if other is None and written_out:
                other, seen = text, ~seen
            made.append(Conditioning(other, cond, seen, *grids))
        return made

    def _grids(self, cond: Tensor | None, image_size: ImageSize | None) -> tuple[Size, Size | None]:
        """Tokens of the image's height and width, and of the low resolution's if there is one."""
        grid = self.geometry.grid(image_size)
        return grid, None if cond is None else self.geometry.cond_grid(image_size)

    def _negative(self, negatives: Sequence[str] | None) -> TextEmbeds | None:
        """The negative prompts; None where all are empty, which is no text at all."""
        if negatives is None or not any(text.strip() for text in negatives):
            return None
        return self.embed_texts(negatives, allow_empty=True)

    def guides(self, text: TextEmbeds, negatives: Sequence[str] | None) -> bool:
        """Whether the branches of guidance differ: not for a text that is the negative one, or
        without any text.
        """
        other = self._negative(negatives)
        if other is None:
            return bool(text.mask.any())
        return not (torch.equal(text.mask, other.mask) and torch.equal(text.embeds, other.embeds))


def check_texts(
    texts: Any, allow_empty: bool = False, classes: Sequence[str] | None = None
) -> list[str]:
    """A list of captions, from one or several.

    Args:
        texts: strings; where there are classes, also their indices, in a list or a tensor.
        allow_empty: whether a caption may be empty.
        classes: names of the model's classes, if it has any.

    Raises:
        ValueError: none, what is not a string, or an empty one unless ``allow_empty``; an index
            of no class.
    """
    given = plain(texts)
    given = given if isinstance(given, list) else [] if given is None else [given]
    if not given:
        raise ValueError("texts is empty: give at least one caption")
    if classes is not None:
        at = [isinstance(label, Integral) and not isinstance(label, bool) for label in given]
        given = [
            classes[whole("class", label, 0, len(classes) - 1)] if index else label
            for label, index in zip(given, at, strict=True)
        ]
    name = "text" if len(given) == 1 else "text {} of " + str(len(given))
    checked = [as_text(text, name.format(i)) for i, text in enumerate(given, 1)]
    empty = [i for i, text in enumerate(checked, 1) if not text.strip()]
    if empty and not allow_empty:
        raise ValueError(f"text {empty[0]} of {len(checked)} is empty: write what to draw")
    return checked


def check_embeds(text_embeds: Any, allow_unseen: bool = False) -> TextEmbeds:
    """Embeddings of texts that were made elsewhere.

    Raises:
        ValueError: no tensor (B, L, E) of finite numbers; a row of which nothing is seen, unless
            ``allow_unseen``.
    """
    if isinstance(text_embeds, TextEmbeds):
        text = text_embeds
    else:
        text = TextEmbeds.of(as_tensor("text_embeds", text_embeds))
    if text.embeds.ndim != 3 or not text.embeds.is_floating_point():
        raise ValueError(
            f"text_embeds must be floating-point numbers (B, L, E), not {text.embeds.dtype} "
            f"{tuple(text.embeds.shape)}"
        )
    if text.embeds.device.type == "cpu":  # a GPU would have to wait for the answer
        if not bool(text.embeds.isfinite().all()):
            raise ValueError("text_embeds holds NaN or infinite numbers")
        unseen = (~text.mask.any(dim=1)).nonzero().flatten().tolist()
        if unseen and not allow_unseen:
            raise ValueError(f"text_embeds: of text {unseen[0] + 1} no token is seen")
    return text


def check_pixels(name: str, images: Any) -> None:
    """Refuse images that are no finite numbers; warn of those that are not in [0, 1].

    Raises:
        ValueError: NaN or infinite numbers.
    """
    images = as_tensor(name, images)
    low, high = (float(end) for end in images.aminmax()) if images.numel() else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} holds NaN or infinite numbers")
    if low < -1e-3 or high > 1 + 1e-3:
        warnings.warn(
            f"{name} range from {low:.4g} to {high:.4g}, but images are in [0, 1]", stacklevel=3
        )


def one_each(negative_texts: Sequence[str] | str | None, batch: int) -> list[str] | None:
    """One negative prompt for each image, from one for all or one each.

    Raises:
        ValueError: another number of them, or what is not a string.
    """
    if negative_texts is None:
        return None
    given = [negative_texts] if isinstance(negative_texts, str) else plain(negative_texts)
    if not isinstance(given, list) or len(given) not in (1, batch):
        count = len(given) if isinstance(given, list) else shown(given)
        raise ValueError(f"{count} negative_texts for {batch} texts: give one for all, or one each")
    checked = [as_text(text, "negative text") for text in given]
    return checked * (batch if len(checked) == 1 else 1)
