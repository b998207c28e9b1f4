"""The network itself: one VQGAN for the three families."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise, zip_longest
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..arguments import MAX_LAYERS, whole
from ..devices import exact
from ..strips import in_strips, norm_silu_conv
from ..vqgan_vae import ImageTokenizer, Upsample

Family = Literal["diffusers", "taming", "maskgit"]


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Block(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice, around a skip."""

    def __init__(self, width_in: int, width: int, groups: int, maskgit: bool):
        super().__init__()
        conv = partial(nn.Conv2d, bias=not maskgit)
        self.norm1, self.norm2 = _norm(width_in, groups), _norm(width, groups)
        self.conv1 = conv(width_in, width, 3, padding=1)
        self.conv2 = conv(width, width, 3, padding=1)
        self.nin_shortcut = None
        if width_in != width:
            self.nin_shortcut = conv(width if maskgit else width_in, width, 1)
        self.maskgit = maskgit

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu_conv(self.norm1, self.conv1, x)
        if self.nin_shortcut is None:
            return norm_silu_conv(self.norm2, self.conv2, h, skip=x, spare=True)
        h = norm_silu_conv(self.norm2, self.conv2, h, spare=True)
        x = h if self.maskgit else x
        return in_strips(self.nin_shortcut, x, self.nin_shortcut.out_channels, sees=0) + h


class Enlarge(Upsample):
    """As the other projects compute it, with their rounding: their pixels are what is promised."""

    def forward(self, x: Tensor) -> Tensor:
        def enlarge(rows: Tensor) -> Tensor:
            return self.conv(F.interpolate(rows, scale_factor=2.0, mode="nearest"))

        return in_strips(enlarge, x, self.conv.out_channels, enlarged=2)


class Attention(nn.Module):
    """Self-attention over all positions, one head, around a skip."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = _norm(width, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """3x3 convolution with stride 2 that pads at the right and at the bottom alone."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The blocks of one resolution, attention after each where it has any, a change of size.

    ``widths``: channels before the first block and after each block.
    """

    def __init__(self, widths: Sequence[int], attention: bool, groups: int, maskgit: bool):
        super().__init__()
        self.block = nn.ModuleList(Block(a, b, groups, maskgit) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(Attention(width, groups) for width in widths[1:] if attention)
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block, attend in zip_longest(self.block, self.attn, fillvalue=nn.Identity()):
            x = attend(block(x))
        return self.upsample(self.downsample(x))


class Half(nn.Module):
    """The encoder ("down") or the decoder ("up"); its levels count from the finest in both."""

    def __init__(
        self,
        conv_in: nn.Module,
        direction: Literal["down", "up"],
        levels: list[Level],
        mid: list[tuple[str, nn.Module]],
        norm_out: nn.GroupNorm,
        conv_out: nn.Conv2d,
    ):
        super().__init__()
        self.conv_in, self.norm_out, self.conv_out = conv_in, norm_out, conv_out
        self.mid = nn.ModuleDict(OrderedDict(mid))
        self.direction = direction
        self.add_module(direction, nn.ModuleList(levels))

    def forward(self, x: Tensor) -> Tensor:
        levels, mid = list(self.get_submodule(self.direction).children()), self.mid.values()
        x = self.conv_in(x)
        for layer in [*levels, *mid] if self.direction == "down" else [*mid, *reversed(levels)]:
            x = layer(x)
        return norm_silu_conv(self.norm_out, self.conv_out, x)


class ForeignVQGAN(ImageTokenizer):
    """Another project's VQGAN, frozen. `load_tokenizer` makes it from a checkpoint.

    Args:
        family: whose it is: "diffusers", "taming" or "maskgit".
        channels: of each resolution, the finest first.
        blocks: residual blocks of a resolution in the encoder; the decoder has one more, but
            MaskGIT's as many.
        latent_channels: of the encoder's result and of the decoder's input.
        code_dim: width of a code.
        codebook_size: number of codes V.
        encoder_attention: whether a resolution has attention, for each.
        decoder_attention: likewise in the decoder, the finest first too.
        mid_attention: attention between the blocks of the middle.
        resample_conv: the resolution is changed by convolutions, not by pooling and repeating.
        stem: channels after the first convolution, those of the finest resolution by default.
        groups: of the group norms.
        signed: the network's pixels are in [-1, 1], not in [0, 1].

    Raises:
        ValueError: numbers that do not fit together.
    """

    def __init__(
        self,
        *,
        family: Family,
        channels: Sequence[int],
        blocks: int,
        latent_channels: int,
        code_dim: int,
        codebook_size: int,
        encoder_attention: Sequence[bool],
        decoder_attention: Sequence[bool],
        mid_attention: bool,
        resample_conv: bool = True,
        stem: int | None = None,
        groups: int = 32,
        signed: bool = True,
    ):
        super().__init__()
        maskgit = family == "maskgit"
        counts = dict(blocks=blocks, latent_channels=latent_channels, code_dim=code_dim)
        counts |= dict(codebook_size=codebook_size, groups=groups)
        for name, value in counts.items():
            whole(name, value, 1)
        whole("blocks", blocks, 1, MAX_LAYERS)
        if not channels or min(channels) < 1:
            raise ValueError(f"channels {list(channels)} must be at least one, and each at least 1")
        stem = channels[0] if stem is None else whole("stem", stem, 1)
        odd = [width for width in [stem, *channels] if width % groups]
        if odd:
            raise ValueError(f"channels {odd[0]} are not divisible by the norms' {groups} groups")
        if not len(channels) == len(encoder_attention) == len(decoder_attention):
            raise ValueError(
                f"channels {list(channels)}, encoder_attention and decoder_attention must have "
                "one entry for each resolution"
            )
        if maskgit and code_dim != latent_channels:
            raise ValueError(f"code_dim {code_dim} must equal latent_channels {latent_channels}")
        self.family, self.signed = family, signed
        self.codebook_size, self.factor = codebook_size, 2 ** (len(channels) - 1)
        top, last = channels[-1], len(channels) - 1

        def level(i: int, before: int, count: int, attention: Sequence[bool]) -> Level:
            return Level([before, *[channels[i]] * count], attention[i], groups, maskgit)

        def mid() -> list[tuple[str, nn.Module]]:
            made: list[tuple[str, nn.Module]] = [
                (f"block_{i}", Block(top, top, groups, maskgit))
                for i in range(1, (blocks if maskgit else 2) + 1)
            ]
            return made[:1] + [("attn_1", Attention(top, groups))] * mid_attention + made[1:]

        more = blocks if maskgit else blocks + 1
        before = [stem, *channels, top]
        down = [level(i, before[i], blocks, encoder_attention) for i in range(last + 1)]
        up = [level(i, before[i + 2], more, decoder_attention) for i in range(last + 1)]
        for i in range(last):
            pool = maskgit or not resample_conv
            down[i].downsample = nn.AvgPool2d(2) if pool else Downsample(channels[i])
            width = channels[i + 1]
            repeat = nn.Upsample(scale_factor=2.0)
            up[i + 1].upsample = Enlarge(width, width) if resample_conv else repeat
        conv = partial(nn.Conv2d, kernel_size=3, padding=1)
        conv_in = conv(3, stem, bias=not maskgit)
        conv_out = nn.Conv2d(top, latent_channels, 1) if maskgit else conv(top, latent_channels)
        self.encoder = Half(conv_in, "down", down, mid(), _norm(top, groups), conv_out)
        conv_in, conv_out = conv(latent_channels, top), conv(channels[0], 3)
        self.decoder = Half(conv_in, "up", up, mid(), _norm(channels[0], groups), conv_out)
        self.quant_conv: nn.Module = nn.Identity()
        self.post_quant_conv: nn.Module = nn.Identity()
        if not maskgit:
            self.quant_conv = nn.Conv2d(latent_channels, code_dim, 1)
            self.post_quant_conv = nn.Conv2d(code_dim, latent_channels, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codebook_size, code_dim)})
        self.requires_grad_(False)

    @torch.no_grad()
    def encode_to_ids(self, images: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Pixels in [0, 1] -> token ids in [0, V); in the weights' precision (`exact`).

        Raises:
            ValueError: see `check_images`.
        """
        images = self.check_images(images)
        with exact(images.device):
            images = images.to(self._codes.dtype)
            z = self.quant_conv(self.encoder(images * 2 - 1 if self.signed else images)).float()
            rows = z.permute(0, 2, 3, 1).flatten(0, 2)
            codes = self._codes.float()
            # the nearest code, by each original's own arithmetic: rounding decides between equals
            if self.family == "diffusers":
                distance = torch.cdist(rows, codes)
            else:
                distance = (rows**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * rows @ codes.T
            return distance.argmin(1).view(len(z), *z.shape[-2:])

    def pixels_of(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        codes = F.embedding(ids, self._codes)
        pixels = self.decoder(self.post_quant_conv(codes.permute(0, 3, 1, 2).contiguous()))
        return pixels / 2 + 0.5 if self.signed else pixels

    @property
    def _codes(self) -> Tensor:
        return self.get_parameter("quantize.embedding.weight")
