"""aMUSEd's transformer (Patil et al. 2024, arXiv 2401.01808), under diffusers' names.

A U-ViT: convolutional blocks, in the 512 px model at half of the resolution, around a plain
transformer. Texts come in twice: as CLIP's states, which every block attends to, and as CLIP's
pooled embedding, which together with five micro-conditions (width, height, two crop coordinates,
aesthetic score) scales and shifts what the norms give. None of this changes over the sampling
steps, so `AmusedTransformer.encode_context` computes all of it once, down to every block's keys and
values.

The weights have the names of diffusers' `UVit2DModel`, so that its files fit as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..arguments import MAX_LAYERS, MAX_TOKENS, MAX_WIDTH, real, whole
from ..layers import attend, taken
from ..structures import Conditioning, TextEmbeds
from ..text import PooledTextEncoder, pooled_text_encoder
from ..transformer import MaskedTransformer

MICRO_CONDITIONS = 5
Constants = tuple[Tensor, ...]  # what a block computes of the text, before the first step


@dataclass(frozen=True)
class AmusedContext:
    """What is constant over the steps, for G branches of B rows.

    Attributes:
        blocks: what each block made of texts and micro-conditions (``constants``), (G, B, ...).
        grid: height and width of the image in tokens.
    """

    blocks: list[Constants]
    grid: tuple[int, int]

    @property
    def num_branches(self) -> int:
        """G"""
        return len(self.blocks[0][0])

    def rows(self, rows: slice | Tensor) -> AmusedContext:
        return self._map(lambda x: x[:, rows].contiguous())

    def branches(self, count: int) -> AmusedContext:
        return self if count == self.num_branches else self._map(lambda x: x[:count])

    def cat(self, other: AmusedContext) -> AmusedContext:
        most = max(self.num_branches, other.num_branches)
        blocks = []
        for pair in zip(self.blocks, other.blocks, strict=True):
            parts = [[torch.cat([x, *[x[:1]] * (most - len(x))]) for x in block] for block in pair]
            blocks.append(tuple(torch.cat(both, dim=1) for both in zip(*parts, strict=True)))
        return replace(self, blocks=blocks)

    def _map(self, function: Callable[[Tensor], Tensor]) -> AmusedContext:
        return replace(self, blocks=[tuple(map(function, block)) for block in self.blocks])


class Norm(nn.Module):
    """A norm whose result the conditioning scales and shifts."""

    def __init__(self, norm: nn.Module, dim: int, cond_dim: int, bias: bool):
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(cond_dim, 2 * dim, bias=bias)

    def constants(self, cond: Float[Tensor, "R D"]) -> Float[Tensor, "R 1 2*D"]:
        return self.linear(F.silu(cond))[:, None]

    def forward(self, x: Float[Tensor, "R N D"], scale_shift: Tensor) -> Float[Tensor, "R N D"]:
        return _modulated(self.norm(x), scale_shift)


def _modulated(x: Tensor, scale_shift: Tensor) -> Tensor:
    scale, shift = scale_shift.chunk(2, dim=-1)
    return x * (1 + scale) + shift


class Attention(nn.Module):
    """Attention to the image itself, or to states whose keys and values are computed before."""

    def __init__(self, dim: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=bias)])

    def _split(self, x: Float[Tensor, "R N D"]) -> Float[Tensor, "R H N d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def constants(self, states: Float[Tensor, "R L D"]) -> Constants:
        return self._split(self.to_k(states)), self._split(self.to_v(states))

    def forward(
        self, x: Float[Tensor, "R N D"], keys_values: Constants | None = None
    ) -> Float[Tensor, "R N D"]:
        k, v = self.constants(x) if keys_values is None else keys_values
        out = attend(self._split(self.to_q(x)), k, v)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class ConvBlock(nn.Module):
    """ConvNeXt V2's block (Woo et al. 2023), then scale and shift by the conditioning."""

    def __init__(self, dim: int, cond_dim: int, bias: bool, affine: bool, eps: float):
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=bias)
        self.norm = nn.RMSNorm(dim, eps, affine)
        self.channelwise_linear_1 = nn.Linear(dim, 4 * dim, bias=bias)
        self.channelwise_norm = ResponseNorm(4 * dim)
        self.channelwise_linear_2 = nn.Linear(4 * dim, dim, bias=bias)
        self.cond_embeds_mapper = nn.Linear(cond_dim, 2 * dim, bias=bias)

    def constants(self, text: Tensor, cond: Float[Tensor, "R D"]) -> Constants:
        return (self.cond_embeds_mapper(F.silu(cond))[:, None],)

    def forward(
        self, x: Float[Tensor, "R N C"], grid: tuple[int, int], scale_shift: Tensor
    ) -> Float[Tensor, "R N C"]:
        y = self.depthwise(_as_map(x, grid)).flatten(2).transpose(1, 2)
        y = F.gelu(self.channelwise_linear_1(self.norm(y)))
        y = x + self.channelwise_linear_2(self.channelwise_norm(y))
        return _modulated(y, scale_shift)


class ResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2): channels compete over the whole image."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, dim)) for _ in range(2))

    def forward(self, x: Float[Tensor, "R N C"]) -> Float[Tensor, "R N C"]:
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        share = (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)
        return self.gamma[0] * (x * share) + self.beta[0] + x


class TextBlock(nn.Module):
    """Two attentions to the text, around skips."""

    def __init__(self, dim: int, heads: int, text_dim: int, bias: bool):
        super().__init__()
        self.kv_mapper = nn.Linear(text_dim, dim, bias=bias) if text_dim != dim else None
        self.norm1, self.norm2 = nn.RMSNorm(dim, 1e-6), nn.RMSNorm(dim, 1e-6)
        self.attn1, self.attn2 = Attention(dim, heads, bias), Attention(dim, heads, bias)

    def constants(self, text: Float[Tensor, "R L D"], cond: Tensor) -> Constants:
        if self.kv_mapper is not None:
            text = self.kv_mapper(F.silu(text))
        return *self.attn1.constants(text), *self.attn2.constants(text)

    def forward(
        self, x: Float[Tensor, "R N C"], grid: tuple[int, int], *keys_values: Tensor
    ) -> Float[Tensor, "R N C"]:
        x = x + self.attn1(self.norm1(x), keys_values[:2])
        return x + self.attn2(self.norm2(x), keys_values[2:])


class GatedLinear(nn.Module):
    """The first half of a gated MLP (GEGLU)."""

    def __init__(self, dim: int, inner: int, bias: bool):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner, bias=bias)

    def forward(self, x: Float[Tensor, "R N D"]) -> Float[Tensor, "R N I"]:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class Layer(nn.Module):
    """Self-attention, attention to the text and MLP, around skips."""

    def __init__(
        self, dim: int, heads: int, ff_dim: int, bias: bool, affine: bool, eps: float
    ):  # fmt: skip
        super().__init__()
        self.norm1 = Norm(nn.RMSNorm(dim, eps, affine), dim, dim, bias)
        self.norm2 = Norm(nn.RMSNorm(dim, eps, affine), dim, dim, bias)
        self.norm3 = Norm(nn.LayerNorm(dim, eps, affine, bias), dim, dim, bias)
        self.attn1, self.attn2 = Attention(dim, heads, bias), Attention(dim, heads, bias)
        # diffusers' names: "net.1" is its dropout
        net = {"0": GatedLinear(dim, ff_dim, bias), "2": nn.Linear(ff_dim, dim, bias=bias)}
        self.ff = nn.ModuleDict({"net": nn.ModuleDict(net)})

    def constants(self, text: Float[Tensor, "R L D"], cond: Float[Tensor, "R D"]) -> Constants:
        norms = [norm.constants(cond) for norm in (self.norm1, self.norm2, self.norm3)]
        return *norms, *self.attn2.constants(text)

    def forward(
        self, x: Float[Tensor, "R N D"], grid: tuple[int, int], *constants: Tensor
    ) -> Float[Tensor, "R N D"]:
        first, second, third, *keys_values = constants
        x = x + self.attn1(self.norm1(x, first))
        x = x + self.attn2(self.norm2(x, second), tuple(keys_values))
        y = self.norm3(x, third)
        for half in self.ff["net"].children():
            y = half(y)
        return x + y


class Resampling(nn.Module):
    """A norm, then a 2 x 2 convolution that halves the sides, or a transposed one that doubles."""

    def __init__(self, dim: int, up: bool, bias: bool, affine: bool, eps: float):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps, affine)
        conv = nn.ConvTranspose2d if up else nn.Conv2d
        self.conv = conv(dim, dim, 2, stride=2, bias=bias)

    def forward(self, x: Float[Tensor, "R N C"], grid: tuple[int, int]) -> Float[Tensor, "R M C"]:
        return self.conv(_as_map(self.norm(x), grid)).flatten(2).transpose(1, 2)


def _as_map(x: Float[Tensor, "R N C"], grid: tuple[int, int]) -> Float[Tensor, "R C h w"]:
    return x.transpose(1, 2).unflatten(2, grid)


class AmusedTransformer(MaskedTransformer):
    """aMUSEd's transformer. `read_pipeline` makes it from a folder in diffusers' layout.

    Texts are CLIP's states before its last layer and its projected pooled embedding, joined to one
    tensor, the pooled one first (`PooledTextEncoder`). All positions are seen, padding too, as in
    its training. Where there is no text, the empty prompt's states stand, which are among the
    weights (``no_text``).

    Args:
        num_tokens: codebook size V.
        seq_len: N of the trained square; other sizes are drawn as well, since no table of positions
            is learned.
        mask_id: what stands for "unknown".
        num_embeddings: ids that can be read: V, the mask, and what rounds that up.
        dim: width of the transformer.
        depth: its layers.
        heads: its attention heads.
        ff_dim: width of its gated MLP.
        channels: of the convolutional blocks.
        conv_blocks: such blocks before and after it, each followed by one that reads the text.
        conv_heads: attention heads of the latter.
        embed_dim: width of the tokens' embeddings and of the hidden states before the head.
        resample: whether the sides are halved in between; sides must then be even in tokens.
        text_embed_dim: width of the text's states.
        pooled_dim: width of the pooled embedding.
        micro_dim: width of each micro-condition's embedding, even.
        text_encoder: where CLIP and its tokenizer are: a folder or a hub repository with
            ``text_encoder`` and ``tokenizer``.
        max_text_len: tokens of a text, to which it is padded.
        factor: pixels per token, for the micro-conditions.
        bias: whether layers have one.
        affine: whether norms have weights.
        eps: of the norms.
        crop: micro-condition: how many pixels were cut off at the top and at the left.
        aesthetic_score: micro-condition, of LAION's classifier, 1 to 10.

    Raises:
        ValueError: numbers that do not fit together.
    """

    block_types = (ConvBlock, TextBlock, Layer)
    partial = True

    def __init__(
        self,
        *,
        num_tokens: int,
        seq_len: int,
        mask_id: int,
        num_embeddings: int,
        dim: int,
        depth: int,
        heads: int,
        ff_dim: int,
        channels: int,
        conv_blocks: int,
        conv_heads: int,
        embed_dim: int,
        resample: bool,
        text_embed_dim: int,
        pooled_dim: int,
        micro_dim: int,
        text_encoder: str,
        max_text_len: int = 77,
        factor: int = 16,
        bias: bool = False,
        affine: bool = True,
        eps: float = 1e-6,
        crop: Sequence[int] = (0, 0),
        aesthetic_score: float = 6.0,
    ):
        super().__init__()
        widths = dict(dim=dim, heads=heads, ff_dim=ff_dim, channels=channels)
        widths |= dict(conv_heads=conv_heads, embed_dim=embed_dim, text_embed_dim=text_embed_dim)
        widths |= dict(pooled_dim=pooled_dim, micro_dim=micro_dim, factor=factor)
        counts = dict(num_tokens=num_tokens, seq_len=seq_len, max_text_len=max_text_len)
        counts |= dict(num_embeddings=num_embeddings)
        for given, most in ((widths, MAX_WIDTH), (counts, MAX_TOKENS)):
            for name, value in given.items():
                whole(name, value, 1, most)
        whole("depth", depth, 1, MAX_LAYERS)
        whole("conv_blocks", conv_blocks, 1, MAX_LAYERS)
        for name, width, divisor in (
            ("dim", dim, heads), ("channels", channels, conv_heads), ("micro_dim", micro_dim, 2)
        ):  # fmt: skip
            if width % divisor:
                raise ValueError(f"{name} {width} is not divisible by {divisor}")
        if not num_tokens <= mask_id < num_embeddings:
            raise ValueError(
                f"mask_id {mask_id} must be from num_tokens {num_tokens} up and below "
                f"num_embeddings {num_embeddings}"
            )
        self.num_tokens, self.seq_len, self.mask_id = num_tokens, seq_len, mask_id
        self.dim, self.factor, self.micro_dim = dim, factor, micro_dim
        self.state_dim, self.pooled_dim = text_embed_dim, pooled_dim
        self.text_embed_dim = max(text_embed_dim, pooled_dim)
        self.max_text_len, self._text_encoder = max_text_len, text_encoder
        self.side_step = 2 if resample else 1
        self.set_micro_conditions(crop, aesthetic_score)

        self.encoder_proj = nn.Linear(text_embed_dim, dim, bias=bias)
        self.encoder_proj_layer_norm = nn.RMSNorm(dim, eps, affine)
        self.embed = nn.ModuleDict(
            {
                "embeddings": nn.Embedding(num_embeddings, embed_dim),
                "layer_norm": nn.RMSNorm(embed_dim, eps, affine),
                "conv": nn.Linear(embed_dim, channels, bias=bias),
            }
        )
        read = MICRO_CONDITIONS * micro_dim + pooled_dim
        self.cond_embed = nn.ModuleDict(
            {
                "linear_1": nn.Linear(read, dim, bias=bias),
                "linear_2": nn.Linear(dim, dim, bias=bias),
            }
        )

        def half(name: str, up: bool) -> nn.ModuleDict:
            made = {
                "res_blocks": nn.ModuleList(
                    ConvBlock(channels, dim, bias, affine, eps) for _ in range(conv_blocks)
                ),
                "attention_blocks": nn.ModuleList(
                    TextBlock(channels, conv_heads, dim, bias) for _ in range(conv_blocks)
                ),
            }
            more = {name: Resampling(channels, up, bias, affine, eps)} if resample else {}
            return nn.ModuleDict(made | more)

        self.down_block = half("downsample", up=False)
        self.project_to_hidden_norm = nn.RMSNorm(channels, eps, affine)
        self.project_to_hidden = nn.Linear(channels, dim, bias=bias)
        self.transformer_layers = nn.ModuleList(
            Layer(dim, heads, ff_dim, bias, affine, eps) for _ in range(depth)
        )
        self.project_from_hidden_norm = nn.RMSNorm(dim, eps, affine)
        self.project_from_hidden = nn.Linear(dim, channels, bias=bias)
        self.up_block = half("upsample", up=True)
        self.mlm_layer = nn.ModuleDict(
            {
                "conv1": nn.Linear(channels, embed_dim, bias=bias),
                "layer_norm": nn.RMSNorm(embed_dim, eps, affine),
                "conv2": nn.Linear(embed_dim, num_tokens, bias=bias),
            }
        )
        self.register_buffer("no_text", torch.zeros(1 + max_text_len, self.text_embed_dim))

    @property
    def text_encoder(self) -> str:
        """Where CLIP is."""
        return self._text_encoder

    def text_reader(self) -> PooledTextEncoder:
        """CLIP, with its projection."""
        return pooled_text_encoder(self._text_encoder, self.max_text_len)

    def set_micro_conditions(
        self, crop: Sequence[int] = (0, 0), aesthetic_score: float = 6.0
    ) -> None:
        """Choose those that the picture's size does not decide. They belong to the fingerprint.

        Args:
            crop: pixels cut off at the top and at the left, at least 0.
            aesthetic_score: of LAION's classifier, 1 to 10.

        Raises:
            ValueError: other numbers.
        """
        if len(crop) != 2:
            raise ValueError(f"crop must be two numbers of pixels, top and left, not {crop!r}")
        self.crop = [whole("crop", side, 0, MAX_TOKENS) for side in crop]
        self.aesthetic_score = real("aesthetic_score", aesthetic_score, 0, 10)
        self._init_args |= {"crop": self.crop, "aesthetic_score": self.aesthetic_score}

    @torch.no_grad()
    def set_no_text(self, text: TextEmbeds) -> None:
        """Take the empty prompt's states, one row, for what stands where there is no text."""
        self.no_text.copy_(text.embeds[0])

    def encode_context(self, *branches: Conditioning) -> AmusedContext:
        """First phase: what every block makes of texts and micro-conditions.

        Args:
            *branches: of the guidance, of the same rows.

        Raises:
            ValueError: embeddings of another shape; a grid with odd sides where they are halved.
        """
        side = math.isqrt(self.seq_len)
        grid = branches[0].grid or (side, side)
        if any(length % self.side_step for length in grid):
            raise ValueError(
                f"a grid of {grid[0]} x {grid[1]} tokens has an odd side, which this transformer "
                f"halves: make the image's sides multiples of {2 * self.factor} pixels"
            )
        texts = torch.cat([self._texts(branch) for branch in branches])
        pooled, states = texts[:, 0, : self.pooled_dim], texts[:, 1:, : self.state_dim]
        text = self.encoder_proj_layer_norm(self.encoder_proj(states))
        micro = [grid[1] * self.factor, grid[0] * self.factor, *self.crop, self.aesthetic_score]
        micro = self._embedded(torch.tensor(micro, dtype=torch.float32, device=texts.device))
        read = torch.cat([pooled, micro.to(pooled).expand(len(pooled), -1)], dim=1)
        cond = self.cond_embed["linear_2"](F.silu(self.cond_embed["linear_1"](read)))
        made = [block.constants(text, cond) for block in self._blocks]
        shape = (len(branches), -1)
        blocks = [tuple(part.unflatten(0, shape) for part in block) for block in made]
        return AmusedContext(blocks, grid)

    def _texts(self, branch: Conditioning) -> Float[Tensor, "B M W"]:
        """The states of a branch, with those of the empty prompt in the rows without a text."""
        if branch.cond_ids is not None:
            raise ValueError("this transformer takes no low-resolution tokens (cond_ids)")
        nothing = self.no_text.to(self.dtype).expand(len(branch.keep), -1, -1)
        if branch.text is None:
            return nothing
        embeds, mask = branch.text.embeds, branch.text.mask
        if embeds.shape[1:] != nothing.shape[1:]:
            raise ValueError(
                f"text_embeds are {tuple(embeds.shape)}, this transformer reads (B, "
                f"{nothing.shape[1]}, {nothing.shape[2]}): the pooled embedding, then the states "
                f"of {self.max_text_len} tokens"
            )
        seen = branch.keep & mask.any(dim=1)
        return torch.where(seen[:, None, None], embeds.to(self.dtype), nothing)

    def _embedded(self, numbers: Float[Tensor, " m"]) -> Float[Tensor, " k"]:
        """Numbers as cosines and sines of falling frequencies."""
        half = self.micro_dim // 2
        powers = torch.arange(half, dtype=torch.float32, device=numbers.device) / half
        angles = numbers[:, None] * torch.exp(-math.log(10_000) * powers)
        return torch.cat([angles.cos(), angles.sin()], dim=1).flatten()

    @property
    def _blocks(self) -> list[Any]:
        """All that have constants, in their order."""
        return [*_pairs(self.down_block), *self.transformer_layers, *_pairs(self.up_block)]

    def forward(
        self,
        ids: Int[Tensor, "B N"],
        context: AmusedContext,
        self_cond: None = None,
        at: Int[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "G B K D"]:
        """Second phase: hidden states of every branch, which `to_logits` reads.

        Args:
            ids: tokens, ``mask_id`` where unknown; the same in all branches.
            context: of G branches.
            self_cond: not read.
            at: the K positions wanted of each row; all by default.
        """
        branches, grid = context.num_branches, context.grid
        if ids.shape[1] != math.prod(grid):
            raise ValueError(f"{ids.shape[1]} tokens given for a grid of {grid[0]} x {grid[1]}")
        inner = grid[0] // self.side_step, grid[1] // self.side_step
        constants = iter(context.blocks)

        def run(blocks: Iterable[Any], x: Tensor) -> Tensor:
            for block in blocks:
                x = block(x, inner, *(part.flatten(0, 1) for part in next(constants)))
            return x

        x = self.embed["conv"](self.embed["layer_norm"](self.embed["embeddings"](ids)))
        if self.side_step > 1:
            x = self.down_block["downsample"](x, grid)
        x = run(_pairs(self.down_block), x.repeat(branches, 1, 1))
        x = self.project_to_hidden(self.project_to_hidden_norm(x))
        x = run(self.transformer_layers, x)
        x = self.project_from_hidden(self.project_from_hidden_norm(x))
        x = run(_pairs(self.up_block), x)
        if self.side_step > 1:
            x = self.up_block["upsample"](x, inner)
        x = x if at is None else taken(x, at.repeat(branches, 1))
        x = self.mlm_layer["layer_norm"](self.mlm_layer["conv1"](x))
        return x.unflatten(0, (branches, -1))

    def to_logits(self, hidden: Float[Tensor, "*s D"]) -> Float[Tensor, "*s V"]:
        """Logits of the codes; a linear layer."""
        return self.mlm_layer["conv2"](hidden)


def _pairs(half: Any) -> Iterator[Any]:
    """Blocks of a convolutional half: each of the convolutional ones, then one with text."""
    for pair in zip(half["res_blocks"], half["attention_blocks"], strict=True):
        yield from pair
