"""Muse: base, then super-resolution, then PIL images (paper, figure 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from .checkpoint import Saveable
from .images import to_pil
from .maskgit import ImageSize, MaskGit
from .provenance import Drawing, fingerprint, made_by, read_drawings, stamp
from .sampling import row_seeds
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
        preset: str | None = None,
        image_size: ImageSize | None = None,
        callback: Callable[[SampleStep], Any] | None = None,
    ) -> list[Image.Image]:
        """Texts -> PIL images at the final size.

        Drawn of texts, a picture carries all that decides it (`provenance`): `save_png` writes
        that beside the pixels, and `like` draws the picture again. One whose sampling the
        callback stopped does not, as nothing says when.

        Args:
            texts: B prompts (a single string is one prompt), or
            text_embeds: what the text encoder, the same of both stages, made of them.
            negative_texts: what to stay away from: one for all, or one each. A stage without
                guidance does not see them.
            seeds: one for each image, or an integer s for s, s + 1, ...; None: random.
            base_options: sampling of the base; by default its ``default_options``.
            superres_options: likewise of the super-resolution. To change one field of a model's
                own: ``muse.superres.default_options.replace(cond_scale=2.0)``.
            preset: named options (`options`) of the base, and of the super-resolution unless it
                is given others.
            image_size: of the final pictures, as in `MaskGit.generate`.
            callback: sees a `SampleStep` after each step of either stage; returning True stops
                that stage.
        """
        text = self.base.embed_texts(texts, text_embeds)
        options = self.seeded_options(len(text.mask), seeds, base_options, superres_options, preset)
        stopped = False

        def watched(step: SampleStep) -> bool:
            nonlocal stopped
            stop = bool(callback and callback(step))
            stopped = stopped or stop
            return stop

        watch = watched if callback else None
        images = self._stages(texts, text, negative_texts, options, image_size, watch)[-1]
        if texts is None or stopped:
            return to_pil(images)
        return self.signed(images, texts, negative_texts, options)

    def signed(
        self,
        images: Float[Tensor, "B 3 H W"],
        texts: Sequence[str] | str,
        negative_texts: Sequence[str] | str | None,
        options: dict[str, SampleOptions],
        edit: dict[str, Any] | None = None,
    ) -> list[Image.Image]:
        """PIL pictures that carry the record of how they were drawn (`provenance`).

        Args:
            images: a whole batch.
            texts: what it was drawn of.
            negative_texts: likewise.
            options: of each stage, with a seed for every row.
            edit: what else decided it; see `Drawing`.
        """
        pictures = to_pil(images)
        drawing = Drawing(
            prompts=(texts,) if isinstance(texts, str) else tuple(texts),
            negatives=_each(negative_texts, len(pictures)),
            options=options,
            rows=tuple(range(len(pictures))),
            model=self.fingerprint,
            made_by=made_by(self.device),
            image_size=pictures[0].size[::-1],
            edit=edit,
        )
        stamp(pictures, drawing)
        return pictures

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
        preset: str | None = None,
        image_size: ImageSize | None = None,
        canvases: dict[str, Int[Tensor, "B N"]] | None = None,
        callback: Callable[[SampleStep], Any] | None = None,
    ) -> list[Float[Tensor, "B 3 H W"]]:
        """Like calling the model, but the images of every stage, as tensors in [0, 1].

        Args:
            canvases: tokens that are given, for the stages "base" and "superres", as in
                `MaskGit.generate`. With them a text may be empty: none at all.
        """
        text = self.base.embed_texts(texts, text_embeds, allow_empty=canvases is not None)
        options = self.seeded_options(len(text.mask), seeds, base_options, superres_options, preset)
        return self._stages(texts, text, negative_texts, options, image_size, callback, canvases)

    @property
    def presets(self) -> dict[str, SampleOptions]:
        """Sampling options by name: those of the base, and as "superres" that stage's default.

        Where that stage has a preset of the same name as the base, `options` shows it.
        """
        own = {} if self.superres is None else {"superres": self.superres.default_options}
        return {**self.base.presets, **own}

    def options(self, preset: str | None = None) -> dict[str, SampleOptions]:
        """Sampling options of the stages "base" and "superres".

        Args:
            preset: a name in ``base.presets``. The super-resolution takes its own preset of that
                name, or its default where it has none. None: the defaults of both.

        Raises:
            ValueError: the base has no such preset.
        """
        name = "default" if preset is None else preset
        options = {"base": self.base.preset(name)}
        if self.superres is not None:
            own = self.superres.presets
            options["superres"] = own.get(name, self.superres.default_options)
        return options

    @property
    def fingerprint(self) -> str:
        """A short name of the weights and the configuration (`provenance.fingerprint`)."""
        return fingerprint(self)

    def like(
        self,
        source: str | PathLike[str] | Drawing,
        callback: Callable[[SampleStep], Any] | None = None,
    ) -> list[Image.Image]:
        """Draw the picture of a PNG again, or all of a sheet's: bit for bit on the same device.

        Whatever was drawn in the same batch is drawn along.

        Args:
            source: file of `save_png`, or one entry of `provenance.read_drawings`.
            callback: as in calling the model.

        Raises:
            ValueError: a file without a record, or another model's.
        """
        if isinstance(source, Drawing):
            drawings, name = [source], "the picture"
        else:
            drawings, name = read_drawings(source), source
        for drawing in drawings:  # before any work
            drawing.check_model(self.fingerprint, name)
        images = []
        for drawing in drawings:
            batch = self(
                drawing.prompts,
                negative_texts=drawing.negatives,
                base_options=drawing.options["base"],
                superres_options=drawing.options.get("superres"),
                image_size=drawing.image_size,
                callback=callback,
            )
            images += [batch[row] for row in drawing.rows]
        return images

    def best_of(
        self,
        n: int,
        score: Callable[[Image.Image, str], float],
        texts: Sequence[str] | str,
        *,
        seeds: int | None = None,
        **arguments: Any,
    ) -> list[Image.Image]:
        """Draw n pictures of each text and keep the one with the highest score.

        Args:
            n: pictures of each text, at least 1. All texts are drawn together, n times.
            score: (picture, text) -> number, more is better; of equal ones the first is kept.
            texts: B prompts.
            seeds: s; text i (0-based) is drawn with the seeds s + i * n to s + i * n + n - 1.
                None: random.
            **arguments: further ones of calling the model.

        Returns:
            B pictures; each carries its record, so that `like` draws it again.

        Raises:
            ValueError: n below 1, or a score that is no number.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        best: list[tuple[float, Image.Image]] = []
        for turn in range(n):
            turns = None if seeds is None else [seeds + i * n + turn for i in range(len(texts))]
            images = self(texts, seeds=turns, **arguments)
            scores = [float(score(*pair)) for pair in zip(images, texts, strict=True)]
            if any(map(math.isnan, scores)):
                raise ValueError(f"score gave {scores}: each must be a number")
            new = list(zip(scores, images, strict=True))
            best = [
                max(pair, key=lambda one: one[0]) for pair in zip(best or new, new, strict=True)
            ]
        return [image for _, image in best]

    def seeded_options(
        self,
        batch: int,
        seeds: int | Sequence[int] | None,
        base: SampleOptions | None,
        superres: SampleOptions | None,
        preset: str | None = None,
    ) -> dict[str, SampleOptions]:
        """The options of each stage, with a seed for every row: both stages' alike if random."""
        if preset is not None and base is not None:
            raise ValueError(f"preset {preset!r} and base_options are both given: choose one")
        if superres is not None and self.superres is None:
            raise ValueError("superres_options given to a model without a super-resolution stage")
        wanted = {"base": base, "superres": superres}
        given = {stage: wanted[stage] or own for stage, own in self.options(preset).items()}
        if seeds is None and any(options.seeds is None for options in given.values()):
            # short enough to be typed, and for every reader of JSON
            drawn = torch.randint(2**31, (batch,)).tolist()

        def seeded(options: SampleOptions) -> SampleOptions:
            own = options.seeds if seeds is None else seeds
            return options.replace(seeds=row_seeds(drawn if own is None else own, batch))

        return {stage: seeded(options) for stage, options in given.items()}

    @torch.no_grad()
    def _stages(
        self,
        texts: Sequence[str] | str | None,
        text: TextEmbeds,
        negative_texts: Sequence[str] | str | None,
        options: dict[str, SampleOptions],
        image_size: ImageSize | None,
        callback: Callable[[SampleStep], Any] | None,
        canvases: dict[str, Int[Tensor, "B N"]] | None = None,
    ) -> list[Float[Tensor, "B 3 H W"]]:
        given = canvases or {}
        negative_texts = _each(negative_texts, len(text.mask))
        base_size = self.superres.cond_pixels(image_size) if self.superres else image_size
        base_ids = self.base.generate_ids(
            text_embeds=text,
            negative_texts=negative_texts,
            canvas=given.get("base"),
            image_size=base_size,
            options=options["base"],
            callback=callback,
        )
        images = [self.base.decode(base_ids, base_size)]
        if self.superres is not None:
            if (
                texts is not None
                and self.superres.transformer.t5_name != self.base.transformer.t5_name
            ):
                text = self.superres.embed_texts(texts, allow_empty=canvases is not None)
            # weights may have been loaded since the last call, so this is asked anew
            assert self.superres.cond_vae is not None
            shares_ids = self.base.vae.same_ids(self.superres.cond_vae)
            vocabulary = self.base.vae.codebook_size  # a callback may have left masks
            superres_options = options["superres"]
            scales = superres_options.cond_scale, superres_options.lowres_scale
            images.append(
                self.superres.generate(
                    text_embeds=text,
                    negative_texts=negative_texts if scales != (1, 1) else None,
                    # ids at hand are not decoded and encoded again
                    cond_ids=base_ids.clamp(max=vocabulary - 1) if shares_ids else None,
                    cond_images=None if shares_ids else images[0],
                    canvas=given.get("superres"),
                    image_size=image_size,
                    options=superres_options,
                    callback=callback,
                )
            )
        return images


def _each(negative_texts: Sequence[str] | str | None, batch: int) -> tuple[str, ...] | None:
    """One negative prompt for each image, of one for all or one each."""
    if negative_texts is None:
        return None
    given = [negative_texts] if isinstance(negative_texts, str) else negative_texts
    if len(given) not in (1, batch):
        raise ValueError(
            f"{len(given)} negative_texts for {batch} texts: give one for all, or one each"
        )
    return tuple(given) * (batch if len(given) == 1 else 1)
