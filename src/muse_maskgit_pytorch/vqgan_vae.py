"""The image tokenizer: a convolutional VQGAN, pixels <-> ids.

Paper 2.2 and A.2: all convolution, no attention, so that it works at any size divisible by its
factor; two residual blocks per resolution. How it is trained is in `training`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .checkpoint import Saveable
from .quantizer import Quantizer, QuantizerName
from .structures import QuantizerOutput

DEFAULT_CODEBOOK_SIZE = 8192  # paper, table 5


def _norm(channels: int) -> nn.GroupNorm:
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= 4)
    return nn.GroupNorm(groups, channels)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with group norm and SiLU before each, around a skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = _norm(channels), _norm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Upsample(nn.Module):
    """Nearest-neighbour enlargement by two, then a 3x3 convolution."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class VQGanVAE(Saveable):
    """Convolutional image tokenizer.

    Args:
        dim: channels at the finest resolution (paper: 128; light: 64).
        vq_codebook_size: number of codes V (paper and default: 8192).
        codebook_size: the same thing under its other name; give one of the two.
        layers: how many times the resolution is halved.
        channel_mults: channels of each of the ``layers + 1`` resolutions as multiples of
            ``dim``; by default 1, 1, 2, 2, 4 (the last ones where there are fewer).
        num_res_blocks: residual blocks per resolution, encoder and decoder each.
        patch_size: pixels folded into channels before the first convolution and unfolded after
            the last (1 is the paper's); 2 or 4 spares the costly finest resolutions.
        quantizer: "vq", "simvq", "lfq" or "fsq", see `Quantizer`.
        codebook_dim: width of a code ("vq", "simvq").
        fsq_levels: FSQ's levels, derived from the codebook size unless given.
        commitment_weight: weight of the commitment term.
        entropy_weight: weight of LFQ's entropy terms.
        diversity_gamma: weight of the codebook's entropy within them.
        codebook_decay: EMA decay of "vq" codes.

    The factor is ``patch_size * 2**layers`` (default 16).
    """

    def __init__(
        self,
        *,
        dim: int = 128,
        vq_codebook_size: int | None = None,
        codebook_size: int | None = None,
        layers: int = 4,
        channel_mults: Sequence[int] | None = None,
        num_res_blocks: int = 2,
        patch_size: int = 1,
        quantizer: QuantizerName = "vq",
        codebook_dim: int = 16,
        fsq_levels: list[int] | None = None,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        diversity_gamma: float = 1.0,
        codebook_decay: float = 0.99,
    ):
        super().__init__()
        if None not in (vq_codebook_size, codebook_size) and vq_codebook_size != codebook_size:
            raise ValueError(
                f"vq_codebook_size {vq_codebook_size} and codebook_size {codebook_size} name the "
                "same thing and disagree: give one of them"
            )
        for name, value in {"dim": dim, "patch_size": patch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if layers < 0 or num_res_blocks < 0:
            raise ValueError(f"layers {layers} and num_res_blocks {num_res_blocks} must be >= 0")
        if dim % 4:
            raise ValueError(f"dim {dim} must be divisible by 4 (group norm)")
        mults = [1] * (layers - 4) + [1, 1, 2, 2, 4][-(layers + 1) :]
        mults = mults if channel_mults is None else list(channel_mults)
        if len(mults) != layers + 1:
            raise ValueError(
                f"channel_mults {mults} must have layers + 1 = {layers + 1} entries, one for each "
                "resolution"
            )
        self.patch_size = patch_size
        self.factor = patch_size * 2**layers
        sizes = [size for size in (vq_codebook_size, codebook_size) if size is not None]
        default = DEFAULT_CODEBOOK_SIZE if fsq_levels is None else math.prod(fsq_levels)
        self.codebook_size = sizes[0] if sizes else default

        widths = [dim * mult for mult in mults]
        pixels = 3 * patch_size**2

        encoder: list[nn.Module] = [nn.Conv2d(pixels, widths[0], 3, padding=1)]
        for i, width in enumerate(widths):
            encoder += [ResBlock(width) for _ in range(num_res_blocks)]
            if i < layers:
                encoder += [nn.Conv2d(width, widths[i + 1], 3, stride=2, padding=1)]
        encoder += [_norm(widths[-1]), nn.SiLU()]
        self.encoder = nn.Sequential(*encoder)

        decoder: list[nn.Module] = [nn.Conv2d(widths[-1], widths[-1], 3, padding=1)]
        for i, width in reversed(list(enumerate(widths))):
            decoder += [ResBlock(width) for _ in range(num_res_blocks)]
            if i > 0:
                decoder += [Upsample(width, widths[i - 1])]
        decoder += [_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], pixels, 3, padding=1)]
        self.decoder = nn.Sequential(*decoder)

        self.quantizer = Quantizer(
            widths[-1],
            self.codebook_size,
            quantizer,
            codebook_dim,
            fsq_levels,
            commitment_weight,
            entropy_weight,
            diversity_gamma,
            codebook_decay,
        )

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

    def encode(self, images: Float[Tensor, "B 3 H W"]) -> QuantizerOutput:
        """Pixels in [0, 1] -> quantized feature map and ids.

        Raises:
            ValueError: not RGB, or a side not divisible by the factor.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), not {tuple(images.shape)}")
        for side in images.shape[-2:]:
            self.fmap_size(side)
        x = F.pixel_unshuffle(images * 2 - 1, self.patch_size)
        return self.quantizer(self.encoder(x))

    def decode(self, quantized: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Quantized feature map -> pixels, unclamped (training needs the gradient)."""
        return F.pixel_shuffle(self.decoder(quantized), self.patch_size) / 2 + 0.5

    def forward(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 3 H W"], QuantizerOutput]:
        """Reconstruction (unclamped) and what the quantizer did: the training forward."""
        output = self.encode(images)
        return self.decode(output.quantized), output

    @torch.no_grad()
    def encode_to_ids(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Pixels in [0, 1] -> token ids in [0, V); in the weights' precision, never autocast.

        In bfloat16 some 2 % of the ids would be others than those of the same image in float32.
        """
        with torch.autocast(images.device.type, enabled=False):
            return self.encode(images).ids

    @torch.no_grad()
    def decode_from_ids(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Token ids -> pixels, clamped to [0, 1]."""
        return self.decode(self.quantizer.decode(ids)).clamp(0, 1)
