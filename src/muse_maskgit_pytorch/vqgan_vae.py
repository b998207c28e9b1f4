"""The image tokenizer: a convolutional VQGAN, pixels <-> ids.

`ImageTokenizer` is what the rest of the package asks of any tokenizer, ours or another project's
(`foreign`); `VQGanVAE` is ours.

Paper 2.2 and A.2: all convolution, no attention, so that it works at any size divisible by its
factor; two residual blocks per resolution. How it is trained is in `training`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .arguments import MAX_LAYERS, MAX_WIDTH, as_tensor, whole
from .checkpoint import Saveable, weights_key
from .devices import exact
from .files import digest_state
from .quantizer import Quantizer, QuantizerName
from .strips import in_strips, norm_silu_conv
from .structures import QuantizerOutput
from .winograd import Conv3x3

DEFAULT_CODEBOOK_SIZE = 8192  # paper, table 5
CPU_PIXELS, PIXELS = 2**15, 2**22  # of pictures that are decoded together


def _norm(channels: int) -> nn.GroupNorm:
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4)
    return nn.GroupNorm(groups, channels)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with group norm and SiLU before each, around a skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(channels), _norm(channels)
        self.conv1, self.conv2 = Conv3x3(channels, channels), Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu_conv(self.norm1, self.conv1, x)
        return norm_silu_conv(self.norm2, self.conv2, h, skip=x, spare=True)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place of (B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class LocalBlock(nn.Module):
    """Two 1x1 convolutions around a skip: every place is for itself."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 1)
        self.conv2 = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


# Of each side of a 3x3 kernel, turned round: which weights meet in each place of a 4x4 one.
_SIDE = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]], device="cpu")
SUMS = torch.kron(_SIDE, _SIDE).T  # (9, 16)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement by two, then a 3x3 convolution, as one transposed convolution.

    A pixel of the result sees only 2x2 different pixels, so the weights that meet the same one are
    added up first: 4 products instead of 9. Only rounding differs.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        plain = self.conv.weight
        kind = "cpu" if plain.is_meta else plain.device.type
        with torch.autocast(kind, enabled=False):  # sums before rounding
            sums = plain.flatten(2) @ SUMS.to(plain)
        weight = sums.unflatten(2, (4, 4)).transpose(0, 1)

        def enlarge(rows: Tensor) -> Tensor:
            return F.conv_transpose2d(rows, weight, self.conv.bias, stride=2, padding=1)

        return in_strips(enlarge, x, self.conv.out_channels, enlarged=2)


class Decoder(nn.Sequential):
    """Layers one after the other, the last three (norm, SiLU, convolution) as one."""

    def forward(self, input: Tensor) -> Tensor:
        *layers, norm, _, conv = list[Any](self)
        for layer in layers:
            input = layer(input)
        return norm_silu_conv(norm, conv, input)


class ImageTokenizer(Saveable):
    """Pixels <-> ids. What the transformers, the cascade and the evaluation use of a tokenizer.

    Attributes:
        codebook_size: number of codes V.
        factor: pixels per token, on each side.
    """

    codebook_size: int
    factor: int
    _compared: tuple[Any, bool] | None = None  # of `same_ids`: keys of both, and the answer

    def fmap_size(self, image_size: int) -> int:
        """Side of the token grid of a square image of ``image_size`` pixels.

        Raises:
            ValueError: the size is not divisible by the factor.
        """
        if image_size < 1 or image_size % self.factor:
            raise ValueError(
                f"image size {image_size} is not a positive multiple of the tokenizer's factor "
                f"{self.factor}: use {max(1, round(image_size / self.factor)) * self.factor}"
            )
        return image_size // self.factor

    def check_images(self, images: Any) -> Tensor:
        """Images that can be encoded.

        Raises:
            ValueError: no floating-point tensor, not RGB, or a side not divisible by the factor.
        """
        images = as_tensor("images", images)
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), not {tuple(images.shape)}")
        for side in images.shape[-2:]:
            self.fmap_size(side)
        return images

    def check_ids(self, ids: Any, name: str = "ids", grid: bool = False) -> Tensor:
        """Token ids of this tokenizer; others would end in an index error, on a GPU in a crash.

        Raises:
            ValueError: no tensor of whole numbers, another shape than (B, N) or, where ``grid``
                asks for it, (B, h, w), or (not seen on a GPU, which would have to wait
                for the answer in every step) some outside the codebook.
        """
        ids = as_tensor(name, ids, whole=True)
        if ids.ndim < 2 or not ids.numel() or (grid and ids.ndim != 3):
            wanted = "(B, h, w)" if grid else "(B, N) or (B, h, w)"
            raise ValueError(f"{name} must be {wanted}, not {tuple(ids.shape)}")
        looked_at = ids.device.type == "cpu" and not torch.compiler.is_compiling()
        if looked_at and not bool(((ids >= 0) & (ids < self.codebook_size)).all()):
            raise ValueError(
                f"{name} range from {ids.min()} to {ids.max()}, "
                f"the codebook has {self.codebook_size} codes"
            )
        return ids

    def encode_to_ids(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Pixels in [0, 1] -> token ids in [0, V)."""
        raise NotImplementedError

    @torch.no_grad()
    def decode_from_ids(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Token ids -> pixels, clamped to [0, 1].

        Within bounded memory: a large batch some pictures at a time, a large picture in `strips`.

        Raises:
            ValueError: see `check_ids`.
        """
        ids = self.check_ids(ids, grid=True)
        together = CPU_PIXELS if ids.device.type == "cpu" else PIXELS
        size = max(1, together // (ids[0].numel() * self.factor**2))
        pixels = torch.cat([self.pixels_of(part) for part in ids.split(size)]).clamp_(0, 1)
        return pixels.to(torch.promote_types(pixels.dtype, torch.float32))

    def pixels_of(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Token ids -> pixels, unclamped, all at once."""
        raise NotImplementedError

    def id_state(self) -> dict[str, Tensor]:
        """The weights that decide which ids an image gets."""
        return self.state_dict()

    def id_settings(self) -> str:
        """What else decides them, beside the weights."""
        return ""

    def id_name(self) -> str:
        """A short name of the ids, the same for tokenizers whose `same_ids` holds: the class and 16
        hexadecimal digits.
        """
        kind = type(self).__name__
        return f"{kind} {digest_state(self.id_state(), f'{kind} {self.id_settings()}')[:16]}"

    def same_ids(self, other: ImageTokenizer) -> bool:
        """Whether the ids of one are the ids of the other: equal weights decide them.

        The values are compared once for as long as neither tokenizer's weights change.
        """
        if self is other:
            return True
        keys = weights_key(self), weights_key(other)
        if self._compared is None or self._compared[0] != keys:
            ours, theirs = self.id_state(), other.id_state()
            same = (
                type(self) is type(other)
                and self.id_settings() == other.id_settings()
                and ours.keys() == theirs.keys()
                and all(ours[k].shape == theirs[k].shape for k in ours)
                and all(torch.equal(ours[k], theirs[k].to(ours[k].device)) for k in ours)
            )
            self._compared = keys, same
        return self._compared[1]


class VQGanVAE(ImageTokenizer):
    """Convolutional image tokenizer.

    Args:
        dim: channels at the finest resolution (paper: 128; light: 64).
        vq_codebook_size: number of codes V (paper and default: 8192).
        codebook_size: the same thing under its other name; give one of the two.
        factor: pixels per token on each side, a power of two (default: 16).
        layers: how many times the resolution is halved; follows from ``factor`` unless given.
        channel_mults: channels of each of the ``layers + 1`` resolutions as multiples of
            ``dim``; by default 1, 1, 2, 2, 4 (the last ones where there are fewer).
        num_res_blocks: residual blocks per resolution, encoder and decoder each.
        patch_size: pixels folded into channels before the first convolution and unfolded after
            the last (1 is the paper's); 2 or 4 spares the costly finest resolutions.
        decoder_dim: channels of the decoder's finest resolution, ``dim`` unless given.
        decoder_res_blocks: residual blocks per resolution of the decoder, ``num_res_blocks``
            unless given. Both are what `with_decoder` sets.
        local_encoder: lets an id depend on its own patch alone: the encoder's norms are over
            channels, and its kernels stay within the patch. Equal patches then get equal ids
            wherever they lie and whatever surrounds them, which a transformer learns faster. By
            default an id says something of its surroundings too, which makes reconstructions
            better.
        quantizer: "vq", "simvq", "lfq", "bsq" or "fsq", see `Quantizer`.
        codebook_dim: width of a code ("vq", "simvq"), see `Quantizer`.
        l2_norm: codes and features on the unit sphere ("vq").
        fsq_levels: FSQ's levels, derived from the codebook size unless given.
        commitment_weight: weight of the commitment term.
        entropy_weight: weight of the entropy terms ("lfq", "bsq"), see `Quantizer`.
        codebook_decay: EMA decay of "vq" codes.

    The factor is ``patch_size * 2**layers``.
    """

    _retired: ClassVar[dict[str, Any]] = {"diversity_gamma": 1.0}

    def __init__(
        self,
        *,
        dim: int = 128,
        vq_codebook_size: int | None = None,
        codebook_size: int | None = None,
        factor: int | None = None,
        layers: int | None = None,
        channel_mults: Sequence[int] | None = None,
        num_res_blocks: int = 2,
        patch_size: int = 1,
        decoder_dim: int | None = None,
        decoder_res_blocks: int | None = None,
        local_encoder: bool = False,
        quantizer: QuantizerName = "vq",
        codebook_dim: int | None = None,
        l2_norm: bool = True,
        fsq_levels: list[int] | None = None,
        commitment_weight: float = 0.25,
        entropy_weight: float | None = None,
        codebook_decay: float = 0.99,
    ):
        super().__init__()
        if None not in (vq_codebook_size, codebook_size) and vq_codebook_size != codebook_size:
            raise ValueError(
                f"vq_codebook_size {vq_codebook_size} and codebook_size {codebook_size} name the "
                "same thing and disagree: give one of them"
            )
        decoder_dim = dim if decoder_dim is None else decoder_dim
        blocks = num_res_blocks if decoder_res_blocks is None else decoder_res_blocks
        for name, value in {"dim": dim, "decoder_dim": decoder_dim}.items():
            if value < 4 or value % 4:
                raise ValueError(f"{name} {value} must be a positive multiple of 4 (group norm)")
            whole(name, value, 4, MAX_WIDTH)
        whole("patch_size", patch_size, 1, MAX_LAYERS)
        layers = whole("layers", _layers(factor, layers, patch_size), 0, 16)
        whole("num_res_blocks", num_res_blocks, 0, MAX_LAYERS)
        whole("decoder_res_blocks", blocks, 0, MAX_LAYERS)
        mults = [1] * (layers - 4) + [1, 1, 2, 2, 4][-(layers + 1) :]
        mults = mults if channel_mults is None else list(channel_mults)
        if len(mults) != layers + 1:
            raise ValueError(
                f"channel_mults {mults} must have layers + 1 = {layers + 1} entries, one for each "
                "resolution"
            )
        for i, mult in enumerate(mults):
            whole(f"channel_mults[{i}]", mult, 1, MAX_WIDTH // max(dim, decoder_dim))
        self.decoder_dim, self.decoder_res_blocks = decoder_dim, blocks
        self.patch_size = patch_size
        self.factor = patch_size * 2**layers
        sizes = [size for size in (vq_codebook_size, codebook_size) if size is not None]
        default = DEFAULT_CODEBOOK_SIZE if fsq_levels is None else math.prod(fsq_levels)
        self.codebook_size = sizes[0] if sizes else default

        if not local_encoder:
            self._init_args.pop("local_encoder", None)  # files of before know none
        widths = [dim * mult for mult in mults]
        pixels = 3 * patch_size**2

        kernel = 1 if local_encoder else 3
        encoder: list[nn.Module] = [nn.Conv2d(pixels, widths[0], kernel, padding=kernel // 2)]
        for i, width in enumerate(widths):
            kind = LocalBlock if local_encoder else ResBlock
            encoder += [kind(width) for _ in range(num_res_blocks)]
            if i < layers:
                side, rim = (2, 0) if local_encoder else (3, 1)
                encoder += [nn.Conv2d(width, widths[i + 1], side, stride=2, padding=rim)]
        encoder += [(ChannelNorm if local_encoder else _norm)(widths[-1]), nn.SiLU()]
        self.encoder = nn.Sequential(*encoder)

        back = [decoder_dim * mult for mult in mults]
        decoder: list[nn.Module] = [nn.Conv2d(widths[-1], back[-1], 3, padding=1)]
        for i, width in reversed(list(enumerate(back))):
            decoder += [ResBlock(width) for _ in range(blocks)]
            if i > 0:
                decoder += [Upsample(width, back[i - 1])]
        decoder += [_norm(back[0]), nn.SiLU(), nn.Conv2d(back[0], pixels, 3, padding=1)]
        self.decoder = Decoder(*decoder)

        self.quantizer = Quantizer(
            widths[-1],
            self.codebook_size,
            quantizer,
            codebook_dim=codebook_dim,
            l2_norm=l2_norm,
            levels=fsq_levels,
            commitment_weight=commitment_weight,
            entropy_weight=entropy_weight,
            decay=codebook_decay,
        )

    def with_decoder(
        self, decoder_dim: int | None = 256, decoder_res_blocks: int | None = 4
    ) -> VQGanVAE:
        """The same encoder and codebook with a larger decoder, to be trained alone.

        Ids stay what they were, so transformers trained on them stay valid. The defaults are the
        paper's (2.5 and A.2), whose tokenizer has 128 channels and 2 blocks itself. Where only
        residual blocks are added the new decoder starts as the old one (the added blocks are the
        identity); with other channels it starts anew.

        Args:
            decoder_dim: channels of the finest resolution; None: as now.
            decoder_res_blocks: residual blocks per resolution; None: as now.

        Raises:
            ValueError: fewer residual blocks than now at the same channels.
        """
        dim = self.decoder_dim if decoder_dim is None else decoder_dim
        blocks = self.decoder_res_blocks
        more = blocks if decoder_res_blocks is None else decoder_res_blocks
        changes: dict[str, Any] = {"decoder_dim": dim, "decoder_res_blocks": more}
        made = VQGanVAE(**{**self._init_args, **changes})
        made.encoder.load_state_dict(self.encoder.state_dict())
        made.quantizer.load_state_dict(self.quantizer.state_dict())
        if dim == self.decoder_dim:
            if more < blocks:
                raise ValueError(
                    f"decoder_res_blocks {more} are fewer than the {blocks} of this decoder"
                )
            old = iter(self.decoder)
            run = 0  # residual blocks since the last other layer
            for layer in made.decoder:
                run = run + 1 if isinstance(layer, ResBlock) else 0
                if run > blocks:
                    assert isinstance(layer, ResBlock)
                    nn.init.zeros_(layer.conv2.weight)
                    nn.init.zeros_(layer.conv2.bias)  # type: ignore[arg-type]
                else:
                    layer.load_state_dict(next(old).state_dict())
        made.license = self.license
        return made.to(self.device).train(self.training)

    def id_state(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.state_dict().items() if not k.startswith("decoder.")}

    def id_settings(self) -> str:
        return repr(self.quantizer.settings)

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> QuantizerOutput:
        """Pixels in [0, 1] -> quantized feature map and ids.

        Raises:
            ValueError: see `check_images`.
        """
        images = self.check_images(images)
        images = images.to(next(self.encoder.parameters()).dtype)
        x = F.pixel_unshuffle(images * 2 - 1, self.patch_size)
        return self.quantizer(self.encoder(x))

    def decode(self, quantized: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Quantized feature map -> pixels, unclamped (training needs the gradient)."""
        quantized = quantized.to(next(self.decoder.parameters()).dtype)
        if quantized.is_cuda and torch.compiler.is_compiling():
            # as a GPU's convolutions like it; torch's own group norm there knows no such layout
            quantized = quantized.contiguous(memory_format=torch.channels_last)
        return F.pixel_shuffle(self.decoder(quantized), self.patch_size) / 2 + 0.5

    def forward(
        self, images: Float[Tensor, "B 3 H W"], latent_noise: float = 0.0
    ) -> tuple[Float[Tensor, "B 3 H W"], QuantizerOutput]:
        """Reconstruction (unclamped) and what the quantizer did: the training forward.

        Args:
            images: in [0, 1].
            latent_noise: standard deviation of normal noise on what the decoder gets, as a
                multiple of its root mean square. A decoder that has seen such noise forgives a
                transformer's imperfect tokens.
        """
        output = self.encode(images)
        latents = output.quantized
        if latent_noise > 0:
            scale = latents.detach().float().square().mean().sqrt()
            latents = latents + latent_noise * scale * torch.randn_like(latents)
        return self.decode(latents), output

    @torch.no_grad()
    def encode_to_ids(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Pixels in [0, 1] -> token ids in [0, V); in the weights' precision (`exact`).

        Under autocast to bfloat16 some 2 % of the ids would differ from those in float32.
        """
        images = self.check_images(images)
        with exact(images.device):
            return self.encode(images).ids

    def pixels_of(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        return self.decode(self.quantizer.decode(ids)).float()


def _layers(factor: int | None, layers: int | None, patch_size: int) -> int:
    """How many halvings give the factor; the two are checked against each other."""
    if factor is None:
        return 4 if layers is None else layers
    halvings, rest = divmod(factor, patch_size)
    if rest or halvings < 1 or halvings & (halvings - 1):
        raise ValueError(
            f"factor {factor} must be patch_size {patch_size} times a power of two, "
            f"such as {[patch_size * 2**i for i in range(2, 6)]}"
        )
    if layers is not None and 2**layers != halvings:
        raise ValueError(
            f"factor {factor} and layers {layers} disagree (patch_size {patch_size} halved "
            f"{layers} times is factor {patch_size * 2**layers}): leave one of them out"
        )
    return halvings.bit_length() - 1
