"""MaskGit: a tokenizer and a masked transformer joined; the training loss, and generation.

``losses`` is the training walk on one screen: images to ids, text to embeddings, guidance
dropout, mask, transformer, loss on the masked positions. ``generate`` is the way back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .arguments import as_tensor, fitting, one_of, real
from .checkpoint import Saveable
from .conditioning import Conditioner, check_pixels, one_each
from .cross_entropy import TINY, cross_entropy
from .geometry import Geometry, ImageSize
from .inference.compiling import compiled
from .inference.graphs import GRAPHS, by_graphs
from .inference.precision import Precision, prepared, resolved, rows_at_once
from .licenses import license_of
from .linears import check_available
from .masking import IGNORE_INDEX, ScheduleFunction, check_schedule, draw_mask, mask_tokens
from .presets import find_preset, make_presets
from .sampling import Callback, Denoiser, SampleOptions, Sampling, Step, choose_tokens
from .sampling.contract import same_as_before
from .sampling.loop import plain_step
from .structures import Conditioning, LossTerms, MaskedTokens, Schedule, TextEmbeds
from .text import LongTexts, TextCompute, TextEncoder
from .transformer import MaskedTransformer, SelfCritic, TokenCritic
from .vqgan_vae import ImageTokenizer

Part = Literal["all", "transformer", "critic"]
CriticTarget = Literal["sampled", "truth"]


class MaskGit(Saveable):
    """A masked generative image transformer: base, or super-resolution with ``cond_image_size``.

    Args:
        vae: trained tokenizer; it is frozen and stays in eval mode.
        transformer: made for ``vae``'s codebook and token grid; ours, or any `MaskedTransformer`.
        image_size: side of the images in pixels.
        cond_image_size: side of the low-resolution images: makes this the super-resolution stage.
        cond_vae: tokenizer of the low-resolution images; ``vae`` by default.
        cond_drop_prob: share of the training samples whose text is removed (paper 2.7: 0.1).
        noise_schedule: law of the training's mask ratio (paper 2.6: cosine; others by name, see
            `masking.mask_ratio`), or a function of one's own: times (B,) in [0, 1] -> ratios,
            falling from 1 to 0.
        rectangle_prob: share of the training's masks that are rectangles (`masking.draw_mask`).
        unmasked_weight: how much a token that is seen counts in the loss, a masked one counting 1.
        label_smoothing: of the cross-entropy.
        z_loss: weight of softmax's squared log denominator (see `cross_entropy`).
        no_mask_token_prob: share of the masked positions that keep their id in the input.
        cond_noise_prob: share of the low-resolution tokens that training replaces by random ones,
            so that super-resolution forgives a base's mistakes.
        self_cond_prob: share of the batches that train with self-conditioning, if the
            transformer has it.
        token_critic: a second transformer that judges sampled tokens.
        self_token_critic: a second head of the transformer does so instead.
        critic_loss_weight: weight of the critic's loss.
        critic_target: what the critic learns to tell of a token: "sampled", whether it was sampled
            or given (Token-Critic, Lezama et al. 2022), or "truth", whether it equals the image's.
        sample_options: defaults of `SampleOptions` for this model, by field name.
        presets: further such settings by name, each complete by itself: fields that it does not
            state are as in `SampleOptions`, not as in ``sample_options``.

    Attributes:
        geometry: sizes in pixels and tokens.
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
        transformer: MaskedTransformer,
        image_size: int,
        cond_image_size: int | None = None,
        cond_vae: ImageTokenizer | None = None,
        cond_drop_prob: float = 0.1,
        noise_schedule: Schedule | str | ScheduleFunction = "cosine",
        rectangle_prob: float = 0.0,
        unmasked_weight: float = 0.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        no_mask_token_prob: float = 0.0,
        cond_noise_prob: float = 0.0,
        self_cond_prob: float = 0.5,
        token_critic: TokenCritic | None = None,
        self_token_critic: bool = False,
        critic_loss_weight: float = 1.0,
        critic_target: CriticTarget = "sampled",
        sample_options: dict[str, Any] | None = None,
        presets: dict[str, dict[str, Any]] | None = None,
    ):
        super().__init__()
        probs = dict(cond_drop_prob=cond_drop_prob, label_smoothing=label_smoothing)
        probs |= dict(no_mask_token_prob=no_mask_token_prob, self_cond_prob=self_cond_prob)
        probs |= dict(rectangle_prob=rectangle_prob, cond_noise_prob=cond_noise_prob)
        for name, value in probs.items():
            real(name, value, 0, 1)
        weights = dict(critic_loss_weight=critic_loss_weight, z_loss=z_loss)
        for name, value in (weights | dict(unmasked_weight=unmasked_weight)).items():
            real(name, value, 0)
        one_of("critic_target", critic_target, CriticTarget)
        check_schedule("noise_schedule", noise_schedule)
        if token_critic is not None and self_token_critic:
            raise ValueError("token_critic and self_token_critic exclude each other: choose one")
        if cond_vae is not None and cond_image_size is None:
            raise ValueError("cond_vae is given without cond_image_size: set both or neither")
        critic_step = 1 if token_critic is None else token_critic.side_step
        side_step = math.lcm(transformer.side_step, critic_step)
        self.geometry = Geometry.of(vae, image_size, cond_vae, cond_image_size, side_step)
        self.geometry.check("transformer", transformer, vae)
        if token_critic is not None:
            self.geometry.check("token_critic", token_critic, vae)
        self.image_size, self.cond_image_size = image_size, cond_image_size
        self.cond_drop_prob, self.noise_schedule = cond_drop_prob, noise_schedule
        self.label_smoothing, self.no_mask_token_prob = label_smoothing, no_mask_token_prob
        self.rectangle_prob, self.unmasked_weight = rectangle_prob, unmasked_weight
        self.z_loss, self.cond_noise_prob = z_loss, cond_noise_prob
        self.self_cond_prob, self.critic_loss_weight = self_cond_prob, critic_loss_weight
        self.critic_target: CriticTarget = critic_target

        self.vae = vae.requires_grad_(False).eval()
        self.cond_vae: ImageTokenizer | None = None
        if cond_image_size is not None:
            self.cond_vae = (cond_vae or vae).requires_grad_(False).eval()
            tokens = self.cond_vae.codebook_size, math.prod(self.geometry.cond_grid())
            transformer = transformer.with_low_resolution(*tokens)
            token_critic = token_critic and token_critic.with_low_resolution(*tokens)
        self.transformer = transformer
        self.critic = SelfCritic(transformer) if self_token_critic else token_critic
        self._init_args |= {"transformer": transformer, "token_critic": token_critic}
        # the paper's 24 base and 8 super-resolution steps (2.8)
        steps = 8 if cond_image_size else 24
        self.own_encoder: TextEncoder | None = None  # with an adapter (`lora`), not in its file
        self._precision: Precision = "float32"
        self._text_compute = TextCompute()
        self._compile: dict[str, Any] | None = None
        self.presets = make_presets(sample_options or {}, presets or {}, steps)
        self.default_options = self.presets["default"]

    def train(self, mode: bool = True) -> MaskGit:
        """Switch the transformers; the tokenizers stay in eval mode (a codebook must not move)."""
        super().train(mode)
        self.vae.eval()
        if self.cond_vae is not None:
            self.cond_vae.eval()
        return self

    @property
    def task(self) -> str:
        texts = self.transformer.classes is None
        return "text-to-image" if texts else "unconditional-image-generation"

    @property
    def precision(self) -> Precision:
        """In which precision it generates (`inference.precision.Precision`); not saved with it.

        "float32" (the default) repeats bits; "bfloat16", "int8" and "float8" (on GPUs) are faster
        where the machine has them; "auto" takes the faster of float32 and bfloat16, by
        measurement; "reference" computes everything the plain way, for comparison.
        """
        return self._precision

    @precision.setter
    def precision(self, precision: Precision) -> None:
        one_of("precision", precision, Precision)
        resolved(precision, self.device)
        self._precision = precision

    @property
    def text_compute(self) -> TextCompute:
        """How its texts are encoded: precision, device, and whether the encoder is kept.

        Not saved with it.
        """
        return self._text_compute

    @text_compute.setter
    def text_compute(self, compute: TextCompute) -> None:
        compute = fitting("text_compute", compute, TextCompute)
        check_available(compute.precision, torch.device(compute.device or self.device))
        self._text_compute = compute

    def compile(self, **options: Any) -> None:
        """Compile the loss, each sampling step and decoding, from their next use on.

        In place of `nn.Module.compile`, which compiles ``forward`` with its checks and texts. Names
        and files stay what they are. With `precision` "reference", drawing is not compiled.

        Args:
            **options: of `torch.compile`; by default ``fullgraph=True``.
        """
        self._compile = {"fullgraph": True, **options}

    @property
    def _drawn_compiled(self) -> dict[str, Any] | None:
        return None if self.precision == "reference" else self._compile

    def swap_vae(self, vae: ImageTokenizer) -> bool:
        """Put a tokenizer in the place of those with the same ids: a better decoder, say.

        Returns:
            whether there was one (`ImageTokenizer.same_ids`); nothing changes otherwise.
        """
        swapped = False
        for name in ("vae", "cond_vae"):
            current = getattr(self, name)
            if current is not None and current.same_ids(vae):
                setattr(self, name, vae.to(self.device).requires_grad_(False).eval())
                self._init_args[name] = vae
                swapped = True
        return swapped

    @property
    def licenses(self) -> dict[str, str]:
        """Of the weights, by part: "weights", and where known "tokenizer" and "text encoder"."""
        encoder = self.transformer.text_encoder
        reads = isinstance(encoder, str) and encoder != "none"
        found = {
            "weights": self.license or "not stated",
            "tokenizer": self.vae.license,
            "text encoder": (license_of(encoder) or "not stated") if reads else None,
        }
        return {part: license for part, license in found.items() if license}

    def preset(self, name: str) -> SampleOptions:
        """The sampling options of that name; every model has "default".

        Raises:
            ValueError: an unknown name.
        """
        return find_preset(self.presets, name)

    def no_texts(self, batch: int) -> list[str] | None:
        """What stands for the texts of an unconditional model; None for any other."""
        return [""] * batch if self.transformer.classes == () else None

    @property
    def conditioner(self) -> Conditioner:
        """What makes this stage's conditioning, from its present parts."""
        reader, compute = self.transformer.text_reader, self.text_compute
        if self.own_encoder is not None:
            reader, compute = self._own_reader, TextCompute(device=compute.device)
        classes = self.transformer.classes
        return Conditioner(reader, classes, self.geometry, self.cond_vae, self.device, compute)

    def check_saveable(self, state: Mapping[str, Tensor] | None = None) -> None:
        """See `Saveable.check_saveable`."""
        self.check_encoder()
        super().check_saveable(state)

    def check_encoder(self) -> None:
        """Refuse a text encoder of its own where its name alone is kept.

        Raises:
            ValueError: an adapter is in it.
        """
        if self.own_encoder is not None:
            raise ValueError(
                "this model reads texts with an adapter of its text encoder, which neither a model "
                "file nor a cache holds: take it out (Muse.unload_lora), and keep its folder"
            )

    def shared_encoder(self) -> TextEncoder:
        """The text encoder of that name, which all models share.

        Raises:
            ValueError: there is none: the model has classes, or texts come as embeddings.
        """
        encoder = self.transformer.text_encoder
        if not isinstance(encoder, str) or encoder == "none":
            what = "classes" if isinstance(encoder, tuple) else "embeddings of one's own (t5_name)"
            raise ValueError(f"this model has no text encoder to adapt: it reads {what}")
        reader = self.transformer.text_reader()
        assert isinstance(reader, TextEncoder)
        return reader

    def _own_reader(self) -> TextEncoder:
        assert self.own_encoder is not None
        return self.own_encoder

    def embed_texts(
        self,
        texts: Sequence[str] | str | None,
        text_embeds: TextEmbeds | Float[Tensor, "B L E"] | None = None,
        *,
        allow_empty: bool = False,
        long: LongTexts = "windows",
    ) -> TextEmbeds:
        """See `Conditioner.embed_texts`."""
        return self.conditioner.embed_texts(texts, text_embeds, allow_empty=allow_empty, long=long)

    def encode_cond(
        self,
        cond_images: Float[Tensor, "B 3 Hc Wc"] | None,
        cond_ids: Int[Tensor, "B ..."] | None,
        images: Float[Tensor, "B 3 H W"] | None = None,
        image_size: ImageSize | None = None,
    ) -> Int[Tensor, "B M"] | None:
        """See `Conditioner.encode_cond`."""
        return self.conditioner.encode_cond(cond_images, cond_ids, images, image_size)

    # Training --------------------------------------------------------------------------------

    def draw_mask(self, batch: int, image_size: ImageSize | None = None) -> Bool[Tensor, "B N"]:
        """The positions to mask in training, by the law of ``noise_schedule`` (2.6)."""
        grid = self.geometry.grid(image_size)
        return draw_mask(
            batch, math.prod(grid), self.noise_schedule, device=self.device, grid=grid,
            rectangle_prob=self.rectangle_prob,
        )  # fmt: skip

    def losses(
        self,
        images_or_ids: Float[Tensor, "B 3 H W"] | Int[Tensor, "B ..."],
        texts: Sequence[str] | None = None,
        *,
        text_embeds: TextEmbeds | Float[Tensor, "B L E"] | None = None,
        cond_images: Float[Tensor, "B 3 Hc Wc"] | None = None,
        cond_ids: Int[Tensor, "B ..."] | None = None,
        image_size: ImageSize | None = None,
        cond_drop_prob: float | None = None,
        part: Part = "all",
        mask: Bool[Tensor, "R N"] | None = None,
        mask_weight: float | Tensor = 1.0,
        token_weight: float = 1.0,
        loss_mask: Float[Tensor, "B 1 H W"] | None = None,
        self_cond: bool | None = None,
    ) -> LossTerms:
        """The named loss terms of one batch (2.6, 2.7).

        Args:
            images_or_ids: pixels in [0, 1], or token ids cached from them.
            texts: captions, or
            text_embeds: what the text encoder made of them.
            cond_images: low-resolution images of ``cond_image_size``; by default ``images``
                scaled down.
            cond_ids: their ids instead.
            image_size: as in `generate`.
            cond_drop_prob: overrides the model's.
            part: "transformer" or "critic" leaves the other's loss out.
            mask: positions to mask; drawn by the model's law unless given. With twice as many rows
                as there are images, each image is there twice (see `complementary` of
                `MaskGitTrainer`).
            mask_weight: factor of the cross-entropy, a mean over this batch's masked tokens. One
                of several micro batches gets its share of all masked tokens times their number.
            token_weight: likewise of the critic's loss, a mean over all tokens.
            loss_mask: in [0, 1], of the images' size: a token counts in the cross-entropy by the
                mean of its patch. Or of the size of the token grid. The critic's loss does not
                heed it.
            self_cond: whether a transformer with self-conditioning is given its own first guess;
                drawn by ``self_cond_prob`` unless given.

        Raises:
            ValueError: arguments that fit neither each other nor the model.
        """
        given = dict(text_embeds=text_embeds, cond_images=cond_images, cond_ids=cond_ids)
        ids, text, cond = self.encoded(images_or_ids, texts, **given, image_size=image_size)
        drop = self.cond_drop_prob
        if cond_drop_prob is not None:
            drop = real("cond_drop_prob", cond_drop_prob, 0, 1)
        if mask is not None and len(mask) == 2 * len(ids):
            ids, text = ids.repeat(2, 1), text.cat(text)
            loss_mask = None if loss_mask is None else loss_mask.repeat(2, 1, 1, 1)
            cond = None if cond is None else cond.repeat(2, 1)
        if cond is not None and self.cond_noise_prob and self.training:
            assert self.cond_vae is not None
            noisy = torch.rand(cond.shape, device=self.device) < self.cond_noise_prob
            cond = torch.where(noisy, torch.randint_like(cond, self.cond_vae.codebook_size), cond)
        conditioning = self.conditioner.dropped(text, cond, drop, image_size)
        mask = self.draw_mask(len(ids), image_size) if mask is None else mask
        masked = mask_tokens(ids, mask, self.transformer.mask_id, self.no_mask_token_prob)

        if self.transformer.self_cond and self_cond is None:
            self_cond = bool(torch.rand((), device="cpu") < self.self_cond_prob)
        recall = bool(self.transformer.self_cond and self_cond)
        shares = None if loss_mask is None else self.token_shares(loss_mask, image_size)
        terms = compiled(_terms, self._compile)
        weights = mask_weight, token_weight, shares
        return terms(self, ids, masked, conditioning, part, recall, *weights)

    def encoded(
        self,
        images_or_ids: Float[Tensor, "B 3 H W"] | Int[Tensor, "B ..."],
        texts: Sequence[str] | None = None,
        *,
        text_embeds: TextEmbeds | Float[Tensor, "B L E"] | None = None,
        cond_images: Float[Tensor, "B 3 Hc Wc"] | None = None,
        cond_ids: Int[Tensor, "B ..."] | None = None,
        image_size: ImageSize | None = None,
    ) -> tuple[Int[Tensor, "B N"], TextEmbeds, Int[Tensor, "B M"] | None]:
        """Token ids, texts and low-resolution ids of a batch; arguments as in `losses`.

        Raises:
            ValueError: arguments that fit neither each other nor the model.
        """
        images = as_tensor("images_or_ids", images_or_ids, whole=None).to(self.device)
        conditioner = self.conditioner
        if texts is None and text_embeds is None:
            texts = self.no_texts(len(images))
        if images.is_floating_point():
            self._check_size(images, image_size)
            ids = self.vae.encode_to_ids(images).flatten(1)
            cond = conditioner.encode_cond(cond_images, cond_ids, images, image_size)
        else:
            ids = self.vae.check_ids(images).flatten(1)
            cond = conditioner.encode_cond(cond_images, cond_ids, image_size=image_size)
        if ids.shape[1] != (wanted := math.prod(self.geometry.grid(image_size))):
            raise ValueError(f"{ids.shape[1]} ids per image, this model has {wanted}")
        text = conditioner.embed_texts(texts, text_embeds, long="cut")
        if len(text.mask) != len(ids):
            raise ValueError(f"{len(text.mask)} texts for {len(ids)} images")
        if cond is not None and len(cond) != len(ids):
            raise ValueError(f"{len(cond)} low-resolution images for {len(ids)} images")
        return ids, text, cond

    def token_shares(
        self, loss_mask: Float[Tensor, "B 1 H W"], image_size: ImageSize | None = None
    ) -> Float[Tensor, "B N"]:
        """What each token counts in the loss: the mean of a mask over its patch."""
        grid = self.geometry.grid(image_size)
        return F.adaptive_avg_pool2d(loss_mask.to(self.device), grid).flatten(1)

    def forward(
        self,
        images_or_ids: Float[Tensor, "B 3 H W"] | Int[Tensor, "B ..."],
        texts: Sequence[str] | None = None,
        **conditioning: Any,
    ) -> Float[Tensor, ""]:
        """The training loss, a scalar with a graph; arguments as in `losses`."""
        return self.losses(images_or_ids, texts, **conditioning).total

    def _check_size(self, images: Tensor, image_size: ImageSize | None) -> None:
        wanted = (3, *self.geometry.pixels(image_size))
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise ValueError(f"images are {tuple(images.shape)}, this model takes B x {wanted}")

    # Generation ------------------------------------------------------------------------------

    @torch.no_grad()
    def denoiser(
        self,
        text: TextEmbeds,
        options: SampleOptions,
        negatives: Sequence[str] | None = None,
        cond: Int[Tensor, "B M"] | None = None,
        image_size: ImageSize | None = None,
    ) -> Denoiser:
        """The transformer with everything that is constant over the steps, for the sampler.

        Args:
            text: of B images (`embed_texts`).
            options: decide whether there is guidance, and whether the critic is needed.
            negatives: one negative prompt each.
            cond: low-resolution ids (`Conditioner.encode_cond`).
            image_size: as in `generate`.

        Raises:
            ValueError: counts that differ.
        """
        batch = len(text.mask)
        if cond is not None and len(cond) != batch:
            raise ValueError(f"{len(cond)} low-resolution images for {batch} texts")
        plain = self.precision == "reference"
        branches = self.conditioner.branches(
            text, cond, negatives, image_size, options.guided, written_out=plain
        )
        given = [tensor for b in branches if b.text for tensor in (b.text.embeds, b.text.mask)]
        network = prepared(self.transformer, self.precision)
        critic = self.critic if options.policy in (None, "critic") else None
        critic = critic and prepared(critic, self.precision)
        return Denoiser(
            network,
            network.encode_context(*branches),
            critic,
            critic and critic.encode_context(*branches),
            at_once=rows_at_once(network, len(branches), math.prod(self.geometry.grid(image_size))),
            repeats=None if plain or batch == 1 else same_as_before(*given, cond),
        )

    @torch.no_grad()
    def start(
        self,
        text: TextEmbeds,
        options: SampleOptions,
        *,
        negatives: Sequence[str] | None = None,
        cond: Int[Tensor, "B M"] | None = None,
        canvas: Int[Tensor, "B N"] | None = None,
        image_size: ImageSize | None = None,
        step: Step | None = None,
    ) -> Sampling | None:
        """Sampling before its first step, from what is encoded already; None if nothing is open.

        Args:
            canvas: as in `generate`.
            step: as in `sampling.sample_tokens`; by default what is fastest.
            **others: as in `denoiser`.

        Raises:
            ValueError: as `check_canvas`; counts that differ.
        """
        canvas = self.check_canvas(canvas, len(text.mask), image_size)
        if not bool((canvas == self.transformer.mask_id).any()):
            return None
        # what changes the context on its way may make the branches differ
        fast = (step is None or step is plain_step) and self.precision != "reference"
        if fast and options.guided and not self.conditioner.guides(text, negatives):
            options = options.replace(cond_scale=1.0)
        denoiser = self.denoiser(text, options, negatives, cond, image_size)
        stream = "" if self.cond_vae is None else "superres"
        grid = self.geometry.grid(image_size)
        if step is None:
            step = compiled(plain_step, self._drawn_compiled)
            if fast and by_graphs(canvas.device):
                step = GRAPHS.step(denoiser, step)
        return Sampling.start(denoiser, canvas, options, grid, stream=stream, step=step)

    @torch.no_grad()
    def sample(
        self,
        text: TextEmbeds,
        options: SampleOptions,
        *,
        callback: Callback | None = None,
        **arguments: Any,
    ) -> Int[Tensor, "B N"]:
        """Sample token ids; the callback as in `generate`, other arguments as in `start`."""
        sampling = self.start(text, options, **arguments)
        if sampling is None:
            canvas, image_size = arguments["canvas"], arguments.get("image_size")
            return self.check_canvas(canvas, len(text.mask), image_size)
        sampling.run(callback)
        return sampling.state.ids

    def check_canvas(
        self, canvas: Any, batch: int, image_size: ImageSize | None = None
    ) -> Int[Tensor, "B N"]:
        """A canvas on the model's device; all masked by default.

        Raises:
            ValueError: one of another size, or of other ids.
        """
        shape = batch, math.prod(self.geometry.grid(image_size))
        mask_id = self.transformer.mask_id
        if canvas is None:
            return torch.full(shape, mask_id, device=self.device)
        canvas = as_tensor("canvas", canvas, whole=True)
        canvas = canvas.flatten(1) if canvas.ndim > 1 else canvas
        if canvas.shape != shape:
            raise ValueError(f"canvas is {tuple(canvas.shape)}, must be {shape}")
        low, high = (int(end) for end in canvas.aminmax()) if canvas.numel() else (0, 0)
        if low < 0 or high > mask_id:
            raise ValueError(
                f"canvas ranges from {low} to {high}: ids reach from 0 to {mask_id}, the mask"
            )
        return canvas.to(self.device)

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
        callback: Callback | None = None,
        options: SampleOptions | None = None,
        **changes: Any,
    ) -> Int[Tensor, "B N"]:
        """Sample token ids; arguments as in `generate`."""
        chosen = (options or self.default_options).replace(**changes)
        if texts is None and text_embeds is None:
            texts = self.no_texts(len(chosen.seeds) if isinstance(chosen.seeds, list) else 1)
        if cond_images is not None:
            check_pixels("cond_images", cond_images)
        text = self.conditioner.embed_texts(texts, text_embeds)
        return self.sample(
            text,
            chosen,
            negatives=one_each(negative_texts, len(text.mask)),
            cond=self.conditioner.encode_cond(cond_images, cond_ids, image_size=image_size),
            canvas=canvas,
            image_size=image_size,
            callback=callback,
        )

    @torch.no_grad()
    def generate(
        self, texts: Sequence[str] | str | None = None, **arguments: Any
    ) -> Float[Tensor, "B 3 H W"]:
        """Generate images from texts.

        Args:
            texts: B prompts, or classes. An unconditional model takes none: it draws a picture for
                each of the ``seeds``, or one.
            text_embeds: their embeddings instead.
            negative_texts: what to stay away from: one for all, or one each; empty for none. They
                take the place of u in ``u + cond_scale * (c - u)``, so they need guidance.
            cond_images: low-resolution images (super-resolution), of ``cond_image_size``, or
            cond_ids: their token ids.
            canvas: token ids (B, N) that are given, ``mask_id`` where to draw.
            image_size: side, or (height, width), in pixels, if not the trained square: the
                learned positions are interpolated. Low-resolution images grow likewise.
            callback: sees a `SampleStep` after each step; returning True stops.
            options: a `SampleOptions`; by default the model's ``default_options``.
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
        options = self._drawn_compiled
        # a large picture is decoded in strips, which are no single graph
        decode = compiled(_decoded, options and {**options, "fullgraph": False})
        return decode(self.vae, ids.view(len(ids), *self.geometry.grid(image_size)))


def _terms(
    model: MaskGit,
    ids: Int[Tensor, "B N"],
    masked: MaskedTokens,
    conditioning: Conditioning,
    part: Part,
    recall: bool,
    mask_weight: float | Tensor,
    token_weight: float,
    shares: Float[Tensor, "B N"] | None,
) -> LossTerms:
    """What `MaskGit.losses` computes, in one graph where it is compiled.

    Args:
        ids: of the images.
        masked: the corruption of them.
        conditioning: what the transformers see besides.
        recall: whether there is a previous pass to condition on.
        part, mask_weight, token_weight: as in `MaskGit.losses`.
        shares: what the tokens count, see `MaskGit.token_shares`; None: all alike.
    """
    transformer, mask = model.transformer, masked.mask
    # counting the masked rows would break a compiled graph and let a GPU wait: there, all rows are
    # computed, and those without a label do not count
    alone = ids.device.type == "cpu" and not torch.compiler.is_compiling()

    def rows(x: Tensor, which: Tensor = mask) -> Tensor:
        return x[which] if alone else x.flatten(0, 1)

    with torch.set_grad_enabled(torch.is_grad_enabled() and part != "critic"):
        context = transformer.encode_context(conditioning)
        self_cond = None
        if recall:
            with torch.no_grad():  # the same context: a dropped text stays dropped
                self_cond = transformer(masked.input_ids, context)
            if not torch.compiler.is_compiling():
                # before torch 2.11 the weights cast in there would stay without a gradient
                torch.clear_autocast_cache()
        [states] = transformer(masked.input_ids, context, self_cond)
        hidden, head = rows(states), transformer.to_logits
        counted = mask if shares is None else mask * shares
        left = ~mask if shares is None else ~mask * shares

        def loss(labels: Tensor, which: Tensor, weights: Tensor) -> Tensor:
            weighted = None if shares is None else rows(weights, which)
            here = rows(states, which), rows(labels, which)
            return cross_entropy(head, *here, model.label_smoothing, model.z_loss, weighted)

        ce = mask_weight * loss(masked.labels, mask, counted)
        total = ce
        if model.unmasked_weight and not (alone and mask.all()):
            seen = loss(torch.where(mask, IGNORE_INDEX, ids), ~mask, left)
            ratio = left.sum() / counted.sum().clamp(min=TINY)
            total = ce + mask_weight * model.unmasked_weight * ratio * seen

    if model.critic is None or part == "transformer":
        return LossTerms(total, ce)
    with torch.no_grad():
        ones, noise = torch.ones(1, device=ids.device), torch.rand_like(hidden[None, :, 0].float())
        sampled, _ = choose_tokens(head(hidden)[None].float(), ones, noise)
    if alone:
        filled = ids.masked_scatter(mask, sampled)
    else:
        filled = torch.where(mask, sampled.view_as(ids), ids)
    genuine = ~mask if model.critic_target == "sampled" else filled == ids
    if isinstance(model.critic, TokenCritic):  # a self-critic reads the transformer's context
        context = model.critic.encode_context(conditioning)
    [hidden] = model.critic(filled, context)
    scores = model.critic.to_logits(hidden).squeeze(-1).float()
    critic = token_weight * F.binary_cross_entropy_with_logits(scores, genuine.float())
    weighted = model.critic_loss_weight * critic
    return LossTerms(weighted if part == "critic" else total + weighted, ce, critic)


def _decoded(vae: ImageTokenizer, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
    return vae.decode_from_ids(ids)
