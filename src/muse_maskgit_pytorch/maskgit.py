"""MaskGit: a tokenizer and a masked transformer joined; the training loss, and generation.

``forward`` is the training walk on one screen: images to ids, text to embeddings, guidance
dropout, mask, transformer, loss on the masked positions. ``generate`` is the way back.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .checkpoint import Saveable
from .masking import draw_mask, mask_ratio, mask_tokens
from .sampling import Denoiser, choose_tokens, sample_tokens
from .structures import Conditioning, LossTerms, SampleOptions, SampleStep, Schedule, TextEmbeds
from .text import LongTexts, get_text_encoder
from .transformer import MaskGitTransformer, SelfCritic, TokenCritic
from .vqgan_vae import ImageTokenizer

Part = Literal["all", "transformer", "critic"]
ImageSize = int | tuple[int, int]  # side of a square, or height and width, in pixels


class MaskGit(Saveable):
    """A masked generative image transformer: base, or super-resolution with ``cond_image_size``.

    Args:
        vae: trained tokenizer; it is frozen and stays in eval mode.
        transformer: made for ``vae``'s codebook and token grid.
        image_size: side of the images in pixels.
        cond_image_size: side of the low-resolution images: makes this the super-resolution stage.
        cond_vae: tokenizer of the low-resolution images; ``vae`` by default.
        cond_drop_prob: share of the training samples whose text is removed (paper 2.7: 0.1).
        noise_schedule: law of the training's mask ratio (paper 2.6: cosine).
        label_smoothing: of the cross-entropy.
        no_mask_token_prob: share of the masked positions that keep their id in the input.
        self_cond_prob: share of the batches that train with self-conditioning, where the
            transformer has it.
        token_critic: a second transformer that judges sampled tokens.
        self_token_critic: a second head of the transformer does so instead.
        critic_loss_weight: weight of the critic's loss.
        sample_options: defaults of `SampleOptions` for this model, by field name.
        presets: further such settings by name, each complete by itself: what it does not say is
            as in `SampleOptions`, not as in ``sample_options``.

    Attributes:
        default_options: of ``sample_options``.
        presets: all as `SampleOptions`, the default ones as "default".

    Raises:
        ValueError: geometry that does not fit; the message names both numbers. Sampling options
            that are unknown or out of range; the message names the preset.
    """

    def __init__(
        self,
        *,
        vae: ImageTokenizer,
        transformer: MaskGitTransformer,
        image_size: int,
        cond_image_size: int | None = None,
        cond_vae: ImageTokenizer | None = None,
        cond_drop_prob: float = 0.1,
        noise_schedule: Schedule = "cosine",
        label_smoothing: float = 0.0,
        no_mask_token_prob: float = 0.0,
        self_cond_prob: float = 0.5,
        token_critic: TokenCritic | None = None,
        self_token_critic: bool = False,
        critic_loss_weight: float = 1.0,
        sample_options: dict[str, Any] | None = None,
        presets: dict[str, dict[str, Any]] | None = None,
    ):
        super().__init__()
        probs = dict(cond_drop_prob=cond_drop_prob, label_smoothing=label_smoothing)
        probs |= dict(no_mask_token_prob=no_mask_token_prob, self_cond_prob=self_cond_prob)
        for name, value in probs.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], not {value}")
        mask_ratio(torch.zeros(()), noise_schedule)  # refuses an unknown one before any work
        if token_critic is not None and self_token_critic:
            raise ValueError("token_critic and self_token_critic exclude each other: choose one")
        if cond_vae is not None and cond_image_size is None:
            raise ValueError("cond_vae is given without cond_image_size: set both or neither")
        self.fmap_size = vae.fmap_size(image_size)
        models = {"transformer": transformer, "token_critic": token_critic}
        for name, model in models.items():
            if model is not None:
                _check_geometry(name, model, vae, image_size)
        self.image_size, self.cond_image_size = image_size, cond_image_size
        self.cond_drop_prob, self.noise_schedule = cond_drop_prob, noise_schedule
        self.label_smoothing, self.no_mask_token_prob = label_smoothing, no_mask_token_prob
        self.self_cond_prob, self.critic_loss_weight = self_cond_prob, critic_loss_weight

        self.vae = vae.requires_grad_(False).eval()
        self.cond_vae: ImageTokenizer | None = None
        if cond_image_size is not None:
            if not 0 < cond_image_size < image_size:
                raise ValueError(
                    f"cond_image_size {cond_image_size} must be smaller than image_size "
                    f"{image_size}"
                )
            self.cond_vae = (cond_vae or vae).requires_grad_(False).eval()
            cond_fmap = self.cond_vae.fmap_size(cond_image_size)
            for model in models.values():
                if model is not None:
                    model.add_cond_encoder(self.cond_vae.codebook_size, cond_fmap**2)
        self.transformer = transformer
        self.critic = SelfCritic(transformer) if self_token_critic else token_critic
        # the paper's 24 base and 8 super-resolution steps (2.8)
        steps = 8 if cond_image_size else 24
        self.default_options = _options("sample_options", sample_options or {}, steps)
        self.presets = {"default": self.default_options}
        for name, settings in (presets or {}).items():
            self.presets[check_preset(name)] = _options(f"preset {name!r}", settings, steps)

    def train(self, mode: bool = True) -> MaskGit:
        """Switch the transformers; the tokenizers stay in eval mode (a codebook must not move)."""
        super().train(mode)
        self.vae.eval()
        if self.cond_vae is not None:
            self.cond_vae.eval()
        return self

    def swap_vae(self, vae: ImageTokenizer) -> bool:
        """Put a tokenizer in the place of those with the same ids: a better decoder, say.

        Returns:
            whether there was one (`ImageTokenizer.same_ids`); nothing changes otherwise.
        """
        swapped = False
        for name in ("vae", "cond_vae"):
            own = getattr(self, name)
            if own is not None and own.same_ids(vae):
                setattr(self, name, vae.to(self.device).requires_grad_(False).eval())
                self._init_args[name] = vae
                swapped = True
        return swapped

    def preset(self, name: str) -> SampleOptions:
        """The sampling options of that name; "default" is there in every model.

        Raises:
            ValueError: an unknown name.
        """
        if name not in self.presets:
            known = ", ".join(self.presets)
            raise ValueError(
                f"unknown preset {name!r}{_near(name, self.presets)}; there is {known}"
            )
        return self.presets[name]

    # Geometry --------------------------------------------------------------------------------

    def pixels(self, image_size: ImageSize | None = None) -> tuple[int, int]:
        """Height and width of an image: as trained, or of ``image_size``, checked.

        Raises:
            ValueError: a side that is no multiple of the tokenizer's factor, or, for
                super-resolution, one whose low-resolution side is none of that of ``cond_vae``.
        """
        if image_size is None:
            return self.image_size, self.image_size
        sides = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
        if len(sides) != 2:
            raise ValueError(f"image_size must be a number or (height, width), not {image_size}")
        step = self.vae.factor
        if self.cond_vae is not None and self.cond_image_size is not None:
            # the smallest step that is whole tokens at both resolutions
            low, factor = Fraction(self.cond_image_size, self.image_size), self.cond_vae.factor
            step = math.lcm(step, low.denominator * factor // math.gcd(low.numerator, factor))
        for side in sides:
            if side < 1 or side % step:
                near = max(1, round(side / step)) * step
                raise ValueError(
                    f"image_size {image_size}: {side} is no positive multiple of {step}, as whole "
                    f"tokens need it; the nearest is {near}"
                )
        height, width = sides
        return height, width

    def grid(self, image_size: ImageSize | None = None) -> tuple[int, int]:
        """Height and width of an image in tokens; see `pixels`."""
        height, width = self.pixels(image_size)
        return height // self.vae.factor, width // self.vae.factor

    def cond_pixels(self, image_size: ImageSize | None = None) -> tuple[int, int]:
        """Height and width of the low-resolution image that belongs to an image."""
        assert self.cond_image_size is not None
        height, width = self.pixels(image_size)
        size, low = self.image_size, self.cond_image_size
        return height * low // size, width * low // size

    def cond_grid(self, image_size: ImageSize | None = None) -> tuple[int, int]:
        """Height and width of the low-resolution image in tokens."""
        assert self.cond_vae is not None
        height, width = self.cond_pixels(image_size)
        return height // self.cond_vae.factor, width // self.cond_vae.factor

    # Conditioning ----------------------------------------------------------------------------

    def embed_texts(
        self,
        texts: Sequence[str] | str | None,
        text_embeds: TextEmbeds | Float[Tensor, "B L E"] | None = None,
        *,
        allow_empty: bool = False,
        long: LongTexts = "windows",
    ) -> TextEmbeds:
        """Captions, or embeddings made elsewhere, as `TextEmbeds` on this model's device.

        An empty one, where it is allowed, is no text at all, as after the training's dropout. What
        is longer than the encoder reads is read in windows, or cut, as in training, with a warning
        (`TextEncoder.encode`).

        Raises:
            ValueError: both or neither given, no texts, or an empty one unless ``allow_empty``.
        """
        if (texts is None) == (text_embeds is None):
            raise ValueError("give either texts or text_embeds")
        if text_embeds is not None:
            text = TextEmbeds.of(text_embeds).to(self.device)
            return TextEmbeds(text.embeds.float(), text.mask)
        texts = [texts] if isinstance(texts, str) else list(texts or ())
        if not texts:
            raise ValueError("texts is empty: give at least one caption")
        wrong = next((t for t in texts if not isinstance(t, str)), None)
        if wrong is not None:
            raise ValueError(f"texts must be strings, not {type(wrong).__name__}")
        empty = [i for i, text in enumerate(texts, 1) if not text.strip()]
        if empty and not allow_empty:
            raise ValueError(f"text {empty[0]} of {len(texts)} is empty: write what to draw")
        encoder = get_text_encoder(self.transformer.t5_name, self.transformer.max_text_len)
        text = encoder.encode(texts, self.device, long)
        seen = torch.tensor([bool(text.strip()) for text in texts], device=self.device)
        return TextEmbeds(text.embeds, text.mask & seen[:, None])

    def encode_cond(
        self,
        cond_images: Float[Tensor, "B 3 Hc Wc"] | None,
        cond_ids: Int[Tensor, "B ..."] | None,
        images: Float[Tensor, "B 3 H W"] | None = None,
        image_size: ImageSize | None = None,
    ) -> Int[Tensor, "B M"] | None:
        """Low-resolution ids: given, or from low-resolution images, or from ``images`` reduced."""
        if self.cond_vae is None:
            if cond_images is not None or cond_ids is not None:
                raise ValueError("cond_images or cond_ids given to a model without cond_image_size")
            return None
        size = self.cond_pixels(image_size)
        if cond_ids is not None:
            cond_ids, wanted = cond_ids.flatten(1), math.prod(self.cond_grid(image_size))
            if cond_ids.shape[1] != wanted:
                raise ValueError(
                    f"{cond_ids.shape[1]} cond_ids per image, cond_image_size "
                    f"{self.cond_image_size} has {wanted}"
                )
            return _check_ids(cond_ids.to(self.device), self.cond_vae, "cond_ids")
        if cond_images is None:
            if images is None:
                raise ValueError(
                    f"super-resolution needs cond_images of {size[0]} x {size[1]} pixels, or "
                    "cond_ids"
                )
            cond_images = F.interpolate(images, size, mode="area")
        if cond_images.shape[-2:] != size:
            raise ValueError(
                f"cond_images are {tuple(cond_images.shape[-2:])} pixels, but must be {size} "
                f"(cond_image_size {self.cond_image_size}): scale them"
            )
        return self.cond_vae.encode_to_ids(cond_images.to(self.device)).flatten(1)

    # Training --------------------------------------------------------------------------------

    def draw_mask(self, batch: int) -> Bool[Tensor, "B N"]:
        """Draw the masks of ``batch`` images by the training's law, on the model's device."""
        return draw_mask(batch, self.fmap_size**2, self.noise_schedule, device=self.device)

    def losses(
        self,
        images_or_ids: Float[Tensor, "B 3 H W"] | Int[Tensor, "B ..."],
        texts: Sequence[str] | None = None,
        *,
        text_embeds: TextEmbeds | Float[Tensor, "B L E"] | None = None,
        cond_images: Float[Tensor, "B 3 Hc Wc"] | None = None,
        cond_ids: Int[Tensor, "B ..."] | None = None,
        cond_drop_prob: float | None = None,
        part: Part = "all",
        mask: Bool[Tensor, "B N"] | None = None,
        mask_weight: float | Tensor = 1.0,
    ) -> LossTerms:
        """The named loss terms of one batch (2.6, 2.7).

        Args:
            images_or_ids: pixels in [0, 1], or token ids cached from them.
            texts: captions, or
            text_embeds: what the text encoder made of them.
            cond_images: low-resolution images of ``cond_image_size``; by default ``images``
                scaled down.
            cond_ids: their ids instead.
            cond_drop_prob: instead of the model's own.
            part: "transformer" or "critic" leaves the other's loss out.
            mask: the positions to predict; drawn (`draw_mask`) unless given.
            mask_weight: factor of the cross-entropy, a mean over this batch's masked tokens.
        """
        images = images_or_ids.to(self.device)
        if images.is_floating_point():
            self._check_size(images)
            ids = self.vae.encode_to_ids(images).flatten(1)
            cond = self.encode_cond(cond_images, cond_ids, images)
        else:
            ids = _check_ids(images.flatten(1), self.vae, "ids")
            cond = self.encode_cond(cond_images, cond_ids)
        if ids.shape[1] != self.fmap_size**2:
            raise ValueError(f"{ids.shape[1]} ids per image, this model has {self.fmap_size**2}")
        text = self.embed_texts(texts, text_embeds, long="cut")
        if len(text.mask) != len(ids):
            raise ValueError(f"{len(text.mask)} texts for {len(ids)} images")
        if cond is not None and len(cond) != len(ids):
            raise ValueError(f"{len(cond)} low-resolution images for {len(ids)} images")

        drop = self.cond_drop_prob if cond_drop_prob is None else cond_drop_prob
        keep = torch.rand(len(ids), device=ids.device) >= drop
        conditioning = Conditioning(text, cond, keep)
        mask = self.draw_mask(len(ids)) if mask is None else mask
        masked = mask_tokens(ids, mask, self.transformer.mask_id, self.no_mask_token_prob)

        with torch.set_grad_enabled(torch.is_grad_enabled() and part != "critic"):
            context = self.transformer.encode_context(conditioning)
            self_cond = None
            if self.transformer.self_cond and torch.rand(()) < self.self_cond_prob:
                with torch.no_grad():  # the same context: a dropped text stays dropped
                    self_cond = self.transformer(masked.input_ids, context)
                # before torch 2.11 the weights cast in there would stay without a gradient
                torch.clear_autocast_cache()
            hidden = self.transformer(masked.input_ids, context, self_cond)
            logits = self.transformer.to_logits(hidden[mask]).float()
            ce = F.cross_entropy(logits, ids[mask], label_smoothing=self.label_smoothing)
            ce = mask_weight * ce

        if self.critic is None or part == "transformer":
            return LossTerms(ce, ce)
        with torch.no_grad():
            ones, noise = torch.ones(1, device=ids.device), torch.rand_like(logits[None, :, 0])
            sampled, _ = choose_tokens(logits[None], ones, noise)
        filled = ids.masked_scatter(mask, sampled)
        critic_context = self.critic.encode_context(conditioning)
        scores = self.critic.to_logits(self.critic(filled, critic_context)).squeeze(-1).float()
        critic = F.binary_cross_entropy_with_logits(scores, (filled == ids).float())
        weighted = self.critic_loss_weight * critic
        return LossTerms(weighted if part == "critic" else ce + weighted, ce, critic)

    def forward(
        self,
        images_or_ids: Float[Tensor, "B 3 H W"] | Int[Tensor, "B ..."],
        texts: Sequence[str] | None = None,
        **conditioning: Any,
    ) -> Float[Tensor, ""]:
        """The training loss, a scalar with a graph; arguments as in `losses`."""
        return self.losses(images_or_ids, texts, **conditioning).total

    def _check_size(self, images: Tensor) -> None:
        wanted = (3, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise ValueError(f"images are {tuple(images.shape)}, this model takes B x {wanted}")

    # Generation ------------------------------------------------------------------------------

    @torch.no_grad()
    def denoiser(
        self,
        text: TextEmbeds,
        options: SampleOptions,
        negative_texts: Sequence[str] | str | None = None,
        cond: Int[Tensor, "B M"] | None = None,
        image_size: ImageSize | None = None,
    ) -> Denoiser:
        """The transformer with everything that is constant over the steps, for the sampler.

        Args:
            text: of B images (`embed_texts`).
            options: decide whether there is guidance, and whether the critic is needed.
            negative_texts: as in `generate`.
            cond: low-resolution ids (`encode_cond`).
            image_size: as in `generate`.

        Raises:
            ValueError: counts that differ, low-resolution guidance without low resolution.
        """
        batch = len(text.mask)
        if cond is not None and len(cond) != batch:
            raise ValueError(f"{len(cond)} low-resolution images for {batch} texts")
        negatives = [""] * batch  # no text at all
        if negative_texts is not None:
            given = [negative_texts] if isinstance(negative_texts, str) else negative_texts
            negatives = list(given) * (batch if len(given) == 1 else 1)
        if len(negatives) != batch:
            raise ValueError(f"{len(negatives)} negative_texts for {batch} texts")
        if options.lowres_scale != 1 and cond is None:
            raise ValueError("lowres_scale is given to a model without a low-resolution image")

        # the parts of the batch: texts; the negative ones; neither these nor a low resolution
        branches = 3 if options.lowres_scale != 1 else 2 if options.cond_scale != 1 else 1
        keep = torch.tensor([True] * batch, device=self.device)
        if branches > 1:
            negative = (
                text if negative_texts is None else self.embed_texts(negatives, allow_empty=True)
            )
            text = text.cat(negative)
            seen = torch.full_like(keep, negative_texts is not None)  # an empty one masks itself
            keep = torch.cat([keep, seen])
            if branches > 2:
                text, keep = text.cat(negative), torch.cat([keep, torch.zeros_like(seen)])
        cond_grid = None if cond is None else self.cond_grid(image_size)
        cond = None if cond is None else cond.repeat(branches, 1)
        conditioning = Conditioning(text, cond, keep, self.grid(image_size), cond_grid)

        def encode(model: Any) -> Any:
            context = model.encode_context(conditioning)
            context.mask[2 * batch :, 1:] = False  # the third part: the null key is all it sees
            return context

        critic = self.critic if options.policy in (None, "critic") else None
        return Denoiser(
            self.transformer, encode(self.transformer), critic, critic and encode(critic)
        )

    @torch.no_grad()
    def generate_ids(
        self,
        texts: Sequence[str] | str | None = None,
        *,
        text_embeds: TextEmbeds | Float[Tensor, "B L E"] | None = None,
        negative_texts: Sequence[str] | str | None = None,
        cond_images: Float[Tensor, "B 3 Hc Wc"] | None = None,
        cond_ids: Int[Tensor, "B ..."] | None = None,
        canvas: Int[Tensor, "B N"] | None = None,
        image_size: ImageSize | None = None,
        callback: Callable[[SampleStep], Any] | None = None,
        options: SampleOptions | None = None,
        **changes: Any,
    ) -> Int[Tensor, "B N"]:
        """Sample token ids; arguments as in `generate`."""
        options = (options or self.default_options).replace(**changes)
        grid = self.grid(image_size)
        text = self.embed_texts(texts, text_embeds)
        cond = self.encode_cond(cond_images, cond_ids, image_size=image_size)
        shape = len(text.mask), math.prod(grid)
        if canvas is None:
            canvas = torch.full(shape, self.transformer.mask_id)
        if canvas.shape != shape:
            raise ValueError(f"canvas is {tuple(canvas.shape)}, must be {shape}")
        denoiser = self.denoiser(text, options, negative_texts, cond, image_size)
        return sample_tokens(denoiser, canvas.to(self.device), options, callback, grid)

    @torch.no_grad()
    def generate(
        self, texts: Sequence[str] | str | None = None, **arguments: Any
    ) -> Float[Tensor, "B 3 H W"]:
        """Generate images from texts.

        Args:
            texts: B prompts.
            text_embeds: their embeddings instead.
            negative_texts: what to stay away from: one for all, or one each; empty for none. They
                take the place of u in ``u + cond_scale * (c - u)``, so they need guidance.
            cond_images: low-resolution images (super-resolution), of ``cond_image_size``, or
            cond_ids: their token ids.
            canvas: token ids (B, N) that are given, ``mask_id`` where to draw.
            image_size: side, or (height, width), in pixels, if not the trained square: the
                learned positions are stretched to it. Low-resolution images are as much larger.
            callback: sees a `SampleStep` after each step; returning True stops.
            options: a `SampleOptions`; the model's ``default_options`` otherwise.
            **changes: single fields of it: ``cond_scale=3.0, timesteps=8, seeds=[1, 2]``.

        Returns:
            RGB in [0, 1].

        Raises:
            ValueError: arguments that fit neither each other nor the model.
        """
        ids = self.generate_ids(texts, **arguments)
        return self.decode(ids, arguments.get("image_size"))

    @torch.no_grad()
    def decode(
        self, ids: Int[Tensor, "B N"], image_size: ImageSize | None = None
    ) -> Float[Tensor, "B 3 H W"]:
        """Token ids -> pixels in [0, 1]."""
        ids = ids.clamp(max=self.vae.codebook_size - 1)  # a callback may have stopped early
        return self.vae.decode_from_ids(ids.view(len(ids), *self.grid(image_size)))


def check_preset(name: str) -> str:
    """Refuse names that have a meaning of their own.

    Raises:
        ValueError: "default" or "superres", or no name at all.
    """
    meaning = {
        "default": "is the model's sample_options",
        "superres": "is the default of a cascade's second stage",
        "": "is no name",
    }
    if name in meaning:
        raise ValueError(f"preset {name!r} {meaning[name]}: take another name, or set that")
    return name


def _options(name: str, settings: dict[str, Any], timesteps: int) -> SampleOptions:
    known = [field.name for field in fields(SampleOptions)]
    for key in settings:
        if key not in known:
            raise ValueError(f"{name}: SampleOptions has no {key!r}{_near(key, known)}")
    try:
        arguments: dict[str, Any] = {"timesteps": timesteps, **settings}
        return SampleOptions(**arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from error


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


def _check_ids(ids: Tensor, vae: ImageTokenizer, name: str) -> Tensor:
    """Ids beyond the codebook would end in an index error, on a GPU in a dead process."""
    # not on a GPU, which would have to wait for the answer in every step
    if ids.device.type == "cpu" and not bool(((ids >= 0) & (ids < vae.codebook_size)).all()):
        raise ValueError(
            f"{name} reach from {ids.min()} to {ids.max()}, "
            f"the codebook has {vae.codebook_size} codes"
        )
    return ids


def _check_geometry(
    name: str, model: MaskGitTransformer, vae: ImageTokenizer, image_size: int
) -> None:
    if model.num_tokens != vae.codebook_size:
        raise ValueError(
            f"{name} has num_tokens {model.num_tokens}, the tokenizer codebook_size "
            f"{vae.codebook_size}: they must be equal"
        )
    seq_len = vae.fmap_size(image_size) ** 2
    if model.seq_len != seq_len:
        raise ValueError(
            f"{name} has seq_len {model.seq_len}, but image_size {image_size} with the tokenizer's "
            f"factor {vae.factor} gives {seq_len} tokens: set seq_len={seq_len}"
        )
