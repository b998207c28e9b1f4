"""Muse: base, then super-resolution, then PIL images (paper, figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from .checkpoint import Saveable
from .images import to_pil
from .maskgit import MaskGit
from .structures import SampleOptions, SampleStep, TextEmbeds


class Muse(Saveable):
    """The cascade.

    Args:
        base: text -> low-resolution image.
        superres: text and low-resolution image -> high-resolution image; None stops after
            the base.

    Raises:
        ValueError: two models whose sizes do not fit.
    """

    def __init__(self, base: MaskGit, superres: MaskGit | None = None):
        super().__init__()
        if base.cond_image_size is not None:
            raise ValueError("base has a cond_image_size: base and superres are swapped")
        if superres is not None and superres.cond_image_size != base.image_size:
            raise ValueError(
                f"base draws {base.image_size} pixels, superres reads cond_image_size "
                f"{superres.cond_image_size}: they must be equal"
            )
        self.base, self.superres = base, superres

    def __call__(self, *args: Any, **kwargs: Any) -> list[Image.Image]:
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        texts: Sequence[str] | str | None = None,
        *,
        text_embeds: TextEmbeds | Float[Tensor, "B L E"] | None = None,
        negative_texts: Sequence[str] | str | None = None,
        seeds: int | Sequence[int] | None = None,
        base_options: SampleOptions | None = None,
        superres_options: SampleOptions | None = None,
        callback: Callable[[SampleStep], Any] | None = None,
    ) -> list[Image.Image]:
        """Texts -> PIL images at the final size.

        Args:
            texts: B prompts (a single string is one prompt), or
            text_embeds: what the text encoder, the same of both stages, made of them.
            negative_texts: what to stay away from: one for all, or one each. A stage without
                guidance does not see them.
            seeds: one for each image, or an integer s for s, s + 1, ...; None: random.
            base_options: sampling of the base; by default its ``default_options``.
            superres_options: likewise of the super-resolution. To change one field of a model's
                own: ``muse.superres.default_options.replace(cond_scale=2.0)``.
            callback: sees a `SampleStep` after each step of either stage; returning True stops
                that stage.
        """
        images = self.stages(
            texts,
            text_embeds=text_embeds,
            negative_texts=negative_texts,
            seeds=seeds,
            base_options=base_options,
            superres_options=superres_options,
            callback=callback,
        )
        return to_pil(images[-1])

    @torch.no_grad()
    def stages(
        self,
        texts: Sequence[str] | str | None = None,
        *,
        text_embeds: TextEmbeds | Float[Tensor, "B L E"] | None = None,
        negative_texts: Sequence[str] | str | None = None,
        seeds: int | Sequence[int] | None = None,
        base_options: SampleOptions | None = None,
        superres_options: SampleOptions | None = None,
        callback: Callable[[SampleStep], Any] | None = None,
    ) -> list[Float[Tensor, "B 3 H W"]]:
        """Like calling the model, but the images of every stage, as tensors in [0, 1]."""
        text = self.base.embed_texts(texts, text_embeds)

        def seeded(options: SampleOptions) -> SampleOptions:
            return options if seeds is None else options.replace(seeds=seeds)

        base_ids = self.base.generate_ids(
            text_embeds=text,
            negative_texts=negative_texts,
            options=seeded(base_options or self.base.default_options),
            callback=callback,
        )
        images = [self.base.decode(base_ids)]
        if self.superres is not None:
            same_text = self.superres.transformer.t5_name == self.base.transformer.t5_name
            same_text = same_text or texts is None
            # weights may have been loaded since the last call, so this is asked anew
            assert self.superres.cond_vae is not None
            shares_ids = self.base.vae.same_ids(self.superres.cond_vae)
            vocabulary = self.base.vae.codebook_size  # a callback may have left masks
            options = seeded(superres_options or self.superres.default_options)
            images.append(
                self.superres.generate(
                    None if same_text else texts,
                    text_embeds=text if same_text else None,
                    negative_texts=negative_texts if options.cond_scale != 1 else None,
                    # ids at hand are not decoded and encoded again
                    cond_ids=base_ids.clamp(max=vocabulary - 1) if shares_ids else None,
                    cond_images=None if shares_ids else images[0],
                    options=options,
                    callback=callback,
                )
            )
        return images
