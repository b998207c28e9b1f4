"""Muse: base, then super-resolution, then PIL images (paper, figure 3)."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from os import PathLike
from typing import Any, Literal, Self, overload

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from .arguments import plain, real, shown, whole
from .checkpoint import CheckpointError, Saveable
from .conditioning import check_texts
from .files import digest_text
from .foreign import is_pipeline, read_pipeline
from .geometry import ImageSize, Size
from .hub import at_revision, signed_in
from .images import to_pil
from .inference.precision import Precision
from .licenses import license_of
from .lora import Lora
from .maskgit import MaskGit
from .provenance import (
    Record,
    attach,
    fingerprint,
    licensed,
    made_on,
    read_records,
    warn_of_other_bits,
)
from .request import Drawn, Request
from .sampling import Callback, SampleOptions, Sampling, Step, known_fields
from .structures import TextEmbeds
from .text import TextCompute


class Muse(Saveable):
    """The cascade.

    Args:
        base: text -> low-resolution image.
        superres: text and low-resolution image -> high-resolution image; if None, the cascade
            ends with the base.

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
        self._loras: list[str] = []  # the adapters in the weights
        self._without: dict[str, dict[str, Tensor]] = {}  # the weights before them, by stage
        self._text_loras: list[str] = []  # which of them are in the text encoders, too

    @property
    def stages(self) -> dict[str, MaskGit]:
        """The models by name: "base" and, if there is one, "superres"."""
        return {"base": self.base} | ({"superres": self.superres} if self.superres else {})

    @property
    def image_size(self) -> int:
        """Side of the pictures as trained, in pixels."""
        return (self.superres or self.base).image_size

    def sizes(self, image_size: ImageSize | None = None) -> dict[str, Size]:
        """Height and width of each stage's images, for pictures as trained or of ``image_size``."""
        if self.superres is None:
            return {"base": self.base.geometry.pixels(image_size)}
        geometry = self.superres.geometry
        return {"base": geometry.cond_pixels(image_size), "superres": geometry.pixels(image_size)}

    @classmethod
    def from_pretrained(
        cls,
        name: str | PathLike[str],
        precision: Precision = "float32",
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Rebuild a saved model, in eval mode, on the CPU.

        Args:
            name: as in `Saveable.from_pretrained`. Or an aMUSEd or a Meissonic in diffusers'
                layout, a folder or a hub repository such as ``amused/amused-256``.
            precision: in which it draws (`precision`).
            revision: as in `Saveable.from_pretrained`; of all parts of an aMUSEd.
            token: likewise.
        """
        name = at_revision(name, revision)
        with signed_in(token):
            if is_pipeline(name):
                made = cls(MaskGit(**read_pipeline(name))).eval()
                made.license = license_of(str(name))
            else:
                made = super().from_pretrained(name)
        made.precision = precision
        return made

    @property
    def task(self) -> str:
        return self.base.task

    @property
    def precision(self) -> Precision:
        """In which precision its stages generate (`MaskGit.precision`)."""
        return self.base.precision

    @precision.setter
    def precision(self, precision: Precision) -> None:
        for stage in self.stages.values():
            stage.precision = precision

    @property
    def text_compute(self) -> TextCompute:
        """How its stages encode texts (`MaskGit.text_compute`)."""
        return self.base.text_compute

    @text_compute.setter
    def text_compute(self, compute: TextCompute) -> None:
        for stage in self.stages.values():
            stage.text_compute = compute

    def compile(self, **options: Any) -> None:
        """Compile its stages (`MaskGit.compile`)."""
        for stage in self.stages.values():
            stage.compile(**options)

    # Adapters --------------------------------------------------------------------------------

    @property
    def loras(self) -> list[str]:
        """The adapters that are in the weights: name, stage, weight and digest of each."""
        return list(self._loras)

    @torch.no_grad()
    def load_lora(self, folder: str | PathLike[str], weight: float = 1.0) -> Self:
        """Add a low-rank adapter (`lora`) to the weights of the stage that it fits.

        Several add up. Drawing costs no more than without; records name the adapters, and the
        model's fingerprint is that of the sum. If there is one for the text encoder, too, the stage
        gets a text encoder of its own.

        Args:
            folder: in peft's format, such as training writes; or with the file of one of diffusers'
                training scripts, such as aMUSEd's, or the file itself.
            weight: of the adapter; 1 is as trained, 0 nothing.

        Raises:
            CheckpointError: missing, damaged, or of another model.
        """
        weight, adapter = real("weight", weight), Lora.read(folder)
        misfits = {name: adapter.misfit(stage.transformer) for name, stage in self.stages.items()}
        fits = [name for name, why in misfits.items() if why is None]
        if not fits:
            raise CheckpointError(
                f"{adapter.path} is an adapter of another model: "
                + "; ".join(f"{name}: {why}" for name, why in misfits.items())
            )
        stage = adapter.stage if adapter.stage in fits else fits[0]
        model, name = self.stages[stage], f"{adapter.path.name} ({stage}) x {weight:g}"
        before: dict[str, Tensor] = {}
        if adapter.text is not None:
            encoder = model.own_encoder or copy.deepcopy(model.shared_encoder())
            part = adapter.text.named_for(encoder)
            part.merge(encoder.model, weight)
            encoder.forget()
            model.own_encoder = encoder
            before |= {n: value.clone() for n, value in model.transformer.named_buffers()}
            model.transformer.text_encoder_changed(encoder)
            name += f" with its text encoder, {part.digest}"
            self._text_loras.append(name)
        before |= adapter.merge(model.transformer, weight)
        self._without[stage] = before | self._without.get(stage, {})
        self._loras.append(f"{name}, {adapter.digest}")
        return self

    @torch.no_grad()
    def unload_lora(self) -> Self:
        """Take all adapters out: the weights are those of before, bit for bit."""
        for stage, weights in self._without.items():
            state = self.stages[stage].transformer.state_dict()
            for name, value in weights.items():
                state[name].copy_(value)
        if self._text_loras:
            for model in self.stages.values():
                model.own_encoder = None
        self._without, self._loras, self._text_loras = {}, [], []
        return self

    def check_saveable(self, state: Mapping[str, Tensor] | None = None) -> None:
        """See `Saveable.check_saveable`."""
        for model in self.stages.values():
            model.check_encoder()
        super().check_saveable(state)

    # Drawing ---------------------------------------------------------------------------------

    @overload
    def __call__(
        self,
        texts: Any = None,
        *,
        return_lowres: Literal[False] = False,
        return_pil_images: Literal[True] = True,
        **arguments: Any,
    ) -> list[Image.Image]: ...

    @overload
    def __call__(self, texts: Any = None, **arguments: Any) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        texts: Sequence[str] | str | None = None,
        *,
        callback: Callback | None = None,
        return_lowres: bool = False,
        return_pil_images: bool = True,
        **arguments: Any,
    ) -> Any:
        """Texts -> PIL images at the final size.

        Pictures drawn from texts carry everything that decides them (`provenance`): `save_png`
        writes it into the file, and `like` draws the picture again. Pictures whose sampling was
        stopped by the callback do not, since nothing says when.

        Args:
            texts: B prompts (a single string is one prompt).
            callback: sees a `SampleStep` after each step of either stage; returning True stops
                that stage.
            return_lowres: also return what the base drew: (images, base images).
            return_pil_images: if False, tensors (B, 3, H, W), RGB in [0, 1], without records.
            **arguments: as in `request`.
        """
        drawn = self.draw(self.request(texts, **arguments), callback)
        if not return_pil_images:
            return (drawn.images, drawn.base_images) if return_lowres else drawn.images
        pictures = self.pictures(drawn)
        return (pictures, to_pil(drawn.base_images)) if return_lowres else pictures

    def request(
        self,
        texts: Sequence[str] | str | None = None,
        *,
        text_embeds: TextEmbeds | Float[Tensor, "B L E"] | None = None,
        negative_texts: Sequence[str] | str | None = None,
        seeds: int | Sequence[int] | None = None,
        base_options: SampleOptions | Mapping[str, Any] | None = None,
        superres_options: SampleOptions | Mapping[str, Any] | None = None,
        preset: str | None = None,
        image_size: ImageSize | None = None,
        canvases: Mapping[str, Int[Tensor, "B N"]] | None = None,
        large: bool = False,
        **changes: Any,
    ) -> Request:
        """Complete a call, for `draw`.

        Args:
            texts: B prompts (a single string is one prompt), or classes, by name or index; an
                unconditional model takes none. Or
            text_embeds: what the text encoder, the same of both stages, made of them.
            negative_texts: what to stay away from: one for all, or one each. A stage without
                guidance does not see them.
            seeds: one for each image, or an integer s for s, s + 1, ...; if None, random.
            base_options: sampling of the base; by default its ``default_options``. Or a mapping:
                the fields to change.
            superres_options: likewise of the super-resolution.
            preset: named options (`options`) of the base, and of the super-resolution unless it
                is given others.
            image_size: of the final pictures, as in `MaskGit.generate`.
            canvases: token ids that are given, by stage, as in `MaskGit.generate`. With them, a
                text may be empty: none at all.
            large: allow more pictures, pixels and steps than `Request.check_size` does.
            **changes: single fields of `SampleOptions`, of both stages (``cond_scale=5.0``) or of
                one (``superres_timesteps=4``).

        Raises:
            ValueError: arguments that fit neither each other nor the model.
        """
        if preset is not None and isinstance(base_options, SampleOptions):
            raise ValueError(f"preset {preset!r} and base_options are both given: choose one")
        options = self.options(preset)
        own: dict[str, dict[str, Any]] = {
            stage: {
                name.removeprefix(f"{stage}_"): changes.pop(name)
                for name in list(changes)
                if name.startswith(f"{stage}_")
            }
            for stage in ("base", "superres")
        }
        known_fields(changes, also=inspect.signature(self.request).parameters)
        if self.superres is None and (superres_options is not None or own["superres"]):
            names = ", ".join(f"superres_{name}" for name in own["superres"] or ["options"])
            raise ValueError(f"{names} given to a model without a super-resolution stage")
        given = {"base": base_options, "superres": superres_options}
        for stage in options:
            mapping = given[stage]
            if isinstance(mapping, SampleOptions):
                options[stage], mapping = mapping, None
            if not isinstance(mapping or {}, Mapping):
                raise ValueError(
                    f"{stage}_options must be SampleOptions or a mapping, not {shown(mapping)}"
                )
            options[stage] = options[stage].replace(**{**changes, **(mapping or {}), **own[stage]})
        size = list(self.sizes(image_size).values())[-1]
        return Request.of(
            texts,
            text_embeds,
            negative_texts,
            seeds,
            options,
            size,
            canvases,
            large=large,
            classes=self.base.transformer.classes,
        )

    @torch.no_grad()
    def draw(
        self,
        request: Request,
        callback: Callback | None = None,
        *,
        steps: Mapping[str, Step] | None = None,
    ) -> Drawn:
        """Draw the pictures of a request.

        Args:
            request: what to draw.
            callback: as in calling the model.
            steps: what advances the sampling of a stage, by its name, in place of
                `sampling.step`.

        Raises:
            ValueError: more than one batch may ask for (`Request.check_size`).
        """
        drawing, stopped = Drawing(self, request, steps), False
        while drawing.sampling is not None:
            stopped = drawing.sampling.run(callback) or stopped
            drawing.proceed(drawing.sampling.state.ids)
        return replace(drawing.drawn, stopped=stopped)

    def pictures(self, drawn: Drawn) -> list[Image.Image]:
        """PIL images; they carry the record of how they were drawn if that is known."""
        pictures = to_pil(drawn.images)
        if drawn.has_record:
            made_by = made_on(self.device, self.precision, self.text_compute.precision, self.loras)
            made_by |= licensed(self.licenses)
            attach(pictures, drawn, self.fingerprint, made_by)
        return pictures

    @property
    def licenses(self) -> dict[str, str]:
        """Of the weights, by part (`MaskGit.licenses`); of both stages, where they differ."""
        whole = {"weights": self.license} if self.license else {}
        found = self.base.licenses | whole
        if self.superres is not None:
            others = self.superres.licenses | whole
            found |= {
                f"{part} of the super-resolution": license
                for part, license in others.items()
                if found.get(part) != license
            }
        return found

    @property
    def fingerprint(self) -> str:
        """A short name of the weights and the configuration (`provenance.fingerprint`).

        Adapters of the text encoder count, too.
        """
        name = fingerprint(self)
        return digest_text(" ".join([name, *self._text_loras]))[:16] if self._text_loras else name

    def like(
        self,
        source: str | PathLike[str] | Record,
        callback: Callback | None = None,
        large: bool = False,
    ) -> list[Image.Image]:
        """Draw the picture of a PNG again, or all of a sheet's.

        Bit for bit on the same kind of device, with the same torch and, on a CPU, the same number
        of threads (`torch.set_num_threads`); otherwise single pixels may differ, and a warning
        says so. Whatever was drawn in the same batch is drawn along with it.

        Args:
            source: file of `save_png`, or one entry of `provenance.read_records`.
            callback: as in calling the model.
            large: as in `request`; to be used for pictures that you trust.

        Raises:
            ValueError: a file without a record, another model's, or one that asks for too much.
        """
        records = [source] if isinstance(source, Record) else read_records(source)
        name = "the picture" if isinstance(source, Record) else source
        records = [record.allowing(large) for record in records]
        for record in records:  # before any work
            record.check(self, name)
        made_by = made_on(self.device, self.precision, self.text_compute.precision)
        warn_of_other_bits(records, made_by, name)
        pictures = []
        for record in records:
            batch = self.pictures(self.draw(record.request, callback))
            pictures += [batch[row] for row in record.rows]
        return pictures

    def best_of(
        self,
        n: int,
        score: Callable[[Image.Image, str], float],
        texts: Sequence[str] | str,
        *,
        seeds: int | None = None,
        callback: Callback | None = None,
        **arguments: Any,
    ) -> list[Image.Image]:
        """Draw n pictures of each text and keep the one with the highest score.

        Args:
            n: pictures of each text, at least 1. All texts are drawn together, n times.
            score: (picture, text) -> number, more is better; among equals the first is kept.
            texts: B prompts.
            seeds: s; text i (0-based) is drawn with the seeds s + i * n to s + i * n + n - 1.
                If None, random.
            callback: as in calling the model.
            **arguments: as in `request`.

        Returns:
            B pictures; each carries its record, so that `like` draws it again.

        Raises:
            ValueError: n below 1, or a score that is not a number.
        """
        n = whole("n", n, 1)
        if not callable(score):
            raise ValueError(
                f"score must be a function of a picture and a text, not {shown(score)}"
            )
        seeds = None if seeds is None else whole("seeds", seeds)
        texts = check_texts(texts, classes=self.base.transformer.classes)
        best: list[tuple[float, Image.Image]] = []
        for turn in range(n):
            turns = None if seeds is None else [seeds + i * n + turn for i in range(len(texts))]
            request = self.request(texts, seeds=turns, **arguments)
            pictures = self.pictures(self.draw(request, callback))
            scores = [plain(score(*pair)) for pair in zip(pictures, texts, strict=True)]
            if any(not isinstance(value, Real) or math.isnan(value) for value in scores):
                raise ValueError(f"score gave {shown(scores)}: each must be a number")
            new = list(zip(scores, pictures, strict=True))
            best = [
                max(pair, key=lambda one: one[0]) for pair in zip(best or new, new, strict=True)
            ]
        return [picture for _, picture in best]

    # Presets ---------------------------------------------------------------------------------

    @property
    def presets(self) -> dict[str, SampleOptions]:
        """Sampling options by name: those of the base, and as "superres" that stage's default.

        If that stage has a preset of the same name as the base, `options` shows it.
        """
        if self.superres is None:
            return dict(self.base.presets)
        return {**self.base.presets, "superres": self.superres.default_options}

    def options(self, preset: str | None = None) -> dict[str, SampleOptions]:
        """Sampling options of each stage.

        Args:
            preset: a name in ``base.presets``. The super-resolution takes its preset of that
                name, or its default if it has none. If None, the defaults of both.

        Raises:
            ValueError: the base has no such preset.
        """
        name = "default" if preset is None else preset
        options = {"base": self.base.preset(name)}
        if self.superres is not None:
            options["superres"] = self.superres.presets.get(name, self.superres.default_options)
        return options


class Drawing:
    """A request on its way through the stages, for `Muse.draw` and whatever draws several at once.

    While there is a ``sampling``, its rows are to be taken to their ends and their ids given to
    `proceed`. Each part computes what a call alone computes.

    Args:
        muse: the model.
        request: what to draw.
        steps: as in `Muse.draw`.

    Attributes:
        stage: name of the stage that samples.
        sampling: of that stage; None at the end. A stage without anything to draw is passed over.

    Raises:
        ValueError: more than one batch may ask for (`Request.check_size`).
    """

    def __init__(self, muse: Muse, request: Request, steps: Mapping[str, Step] | None = None):
        request.check_size(trained=muse.image_size)
        self.muse, self.request, self.steps = muse, request, steps or {}
        self.sizes = muse.sizes(request.image_size)
        self._texts: dict[Any, TextEmbeds] = {}  # of each text encoder
        self._images: list[Tensor] = []
        self._left = list(muse.stages)
        self.sampling: Sampling | None = None
        self._start(None)

    @property
    def drawn(self) -> Drawn:
        """What came of it."""
        assert self.sampling is None
        return Drawn(self._images[-1], self.request, self._images[0])

    @torch.no_grad()
    def proceed(self, ids: Int[Tensor, "B N"]) -> None:
        """End the stage: decode what it sampled, and start the next one, if there is one.

        Args:
            ids: of the sampling.
        """
        self._images.append(self.muse.stages[self.stage].decode(ids, self.sizes[self.stage]))
        self.sampling = None
        if self._left:
            self._start(ids)

    @torch.no_grad()
    def _start(self, ids: Int[Tensor, "B N"] | None) -> None:
        """Start the next stage.

        Args:
            ids: of the one before, if there is one.
        """
        muse, request = self.muse, self.request
        self.stage = name = self._left.pop(0)
        stage, size = muse.stages[name], self.sizes[name]
        # embeddings that were given are those of every encoder
        own = stage.own_encoder or stage.transformer.text_encoder
        encoder = own if request.prompts else None
        if encoder not in self._texts:
            given = request.prompts, request.text_embeds
            self._texts[encoder] = stage.embed_texts(*given, allow_empty=bool(request.canvases))
        cond = None
        if stage.cond_vae is not None and ids is not None:
            # ids at hand are not decoded and encoded again
            same = muse.base.vae.same_ids(stage.cond_vae)
            codes = muse.base.vae.codebook_size  # a callback may have left masks
            read = (None, ids.clamp(max=codes - 1)) if same else (self._images[0], None)
            cond = stage.encode_cond(*read, image_size=size)
        self.sampling = stage.start(
            self._texts[encoder],
            request.options[name],
            negatives=request.negatives,
            cond=cond,
            canvas=request.canvases.get(name),
            image_size=size,
            step=self.steps.get(name),
        )
        if self.sampling is None:
            self.proceed(stage.check_canvas(request.canvases[name], len(request), size))
