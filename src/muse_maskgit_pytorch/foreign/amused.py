"""aMUSEd's transformer (Patil et al. 2024, arXiv 2401.01808), under diffusers' names.

A U-ViT: convolutional blocks, in the 512 px model at half of the resolution, around a plain
transformer. Every block attends to CLIP's states; the vector of pooled embedding and
micro-conditions scales and shifts what the norms give. None of this changes over the sampling
steps, so `AmusedTransformer.encode_context` computes all of it once, down to every block's keys and
values.

The weights have the names of diffusers' `UVit2DModel`, so that its files fit as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..arguments import MAX_LAYERS, MAX_WIDTH
from ..layers import attend
from ..structures import Conditioning
from .clip import (
    ClipContext,
    ClipTransformer,
    Constants,
    as_map,
    check_divisible,
    check_sizes,
    modulated,
)


@dataclass(frozen=True)
class AmusedContext(ClipContext):
    """The same of aMUSEd, with its values of the text's tokens (`transformer.Context`).

    Attributes:
        values: which of each part's constants are such; values that are attended to besides follow
            its constants.
        shared: whose queries and keys each row takes, if not its own.
    """

    values: Sequence[Sequence[int]] = ()

    def branches(self, count: int) -> ClipContext:
        made = super().branches(count)
        rows = count * self.parts[0][0].shape[1]
        return replace(made, shared=tuple(sees[:rows] for sees in self.shared))

    @property
    def text_values(self) -> list[Float[Tensor, "G B H L d"]]:
        """Of all attentions to the text, in their order."""
        pairs = zip(self.parts, self.values, strict=True)
        return [part[place] for part, places in pairs for place in places]

    def with_text_values(
        self,
        values: Sequence[Tensor],
        sees: Int[Tensor, " R"] | None = None,
        added: Sequence[Tensor] = (),
    ) -> AmusedContext:
        """The same with others in the place of `text_values`; see `transformer.Context`."""
        new, more, parts = iter(values), iter(added), []
        for part, places in zip(self.parts, self.values, strict=True):
            changed = [next(new) if at in places else x for at, x in enumerate(part)]
            parts.append((*changed, *islice(more, len(places))))
        return replace(self, parts=parts, shared=() if sees is None else (sees,))


class Norm(nn.Module):
    """A norm whose result the conditioning scales and shifts."""

    def __init__(self, norm: nn.Module, dim: int, cond_dim: int, bias: bool):
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(cond_dim, 2 * dim, bias=bias)

    def constants(self, cond: Float[Tensor, "R D"]) -> Float[Tensor, "R 1 2*D"]:
        return self.linear(F.silu(cond))[:, None]

    def forward(self, x: Float[Tensor, "R N D"], scale_shift: Tensor) -> Float[Tensor, "R N D"]:
        return modulated(self.norm(x), scale_shift)


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
        self,
        x: Float[Tensor, "R N D"],
        keys_values: Constants | None = None,
        sees: Int[Tensor, " R"] | None = None,
        added: Tensor | None = None,
    ) -> Float[Tensor, "R N D"]:
        """Attention.

        Args:
            x: hidden states.
            keys_values: of the text; None: of the image itself.
            sees: whose queries and keys each row takes; its own by default.
            added: values that are attended to besides, with maps of the row's own.
        """
        k, v = self.constants(x) if keys_values is None else keys_values
        q = self._split(self.to_q(x))
        out = attend(q, k, v) if sees is None else attend(q[sees], k[sees], v)
        out = out if added is None else out + attend(q, k, added)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class ConvBlock(nn.Module):
    """ConvNeXt V2's block (Woo et al. 2023), then scale and shift by the conditioning."""

    values = ()  # among its constants

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
        y = self.depthwise(as_map(x, grid)).flatten(2).transpose(1, 2)
        y = F.gelu(self.channelwise_linear_1(self.norm(y)))
        y = x + self.channelwise_linear_2(self.channelwise_norm(y))
        return modulated(y, scale_shift)


class ResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2): channels compete over the whole image."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, dim)) for _ in range(2))

    def forward(self, x: Float[Tensor, "R N C"]) -> Float[Tensor, "R N C"]:
        at_least = torch.promote_types(x.dtype, torch.float32)
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=at_least)
        share = (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)
        return self.gamma[0] * (x * share) + self.beta[0] + x


class TextBlock(nn.Module):
    """Two attentions to the text, around skips."""

    values = (1, 3)

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
        self,
        x: Float[Tensor, "R N C"],
        grid: tuple[int, int],
        *constants: Tensor,
        sees: Tensor | None = None,
    ) -> Float[Tensor, "R N C"]:
        added = constants[4:]
        x = x + self.attn1(self.norm1(x), constants[:2], sees, *added[:1])
        return x + self.attn2(self.norm2(x), constants[2:4], sees, *added[1:])


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

    values = (4,)

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
        self,
        x: Float[Tensor, "R N D"],
        grid: tuple[int, int],
        *constants: Tensor,
        sees: Tensor | None = None,
    ) -> Float[Tensor, "R N D"]:
        first, second, third, keys, values, *added = constants
        x = x + self.attn1(self.norm1(x, first))
        x = x + self.attn2(self.norm2(x, second), (keys, values), sees, *added)
        y = self.norm3(x, third)
        for half in self.ff["net"].children():
            y = half(y)
        return x + y


class AmusedTransformer(ClipTransformer):
    """aMUSEd's transformer.

    Args:
        depth: layers of the plain transformer.
        heads: its attention heads.
        ff_dim: width of its gated MLP.
        conv_blocks: convolutional blocks before and after it, each followed by one that reads the
            text.
        conv_heads: attention heads of the latter.
        num_tokens: as of `ClipTransformer`, and so is all that follows.

    Raises:
        ValueError: numbers that do not fit together.
    """

    block_types = (ConvBlock, TextBlock, Layer)
    weighs_words = True

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
        super().__init__(
            num_tokens=num_tokens, seq_len=seq_len, mask_id=mask_id, num_embeddings=num_embeddings,
            dim=dim, channels=channels, embed_dim=embed_dim, resample=resample,
            text_embed_dim=text_embed_dim, pooled_dim=pooled_dim, micro_dim=micro_dim,
            text_encoder=text_encoder, max_text_len=max_text_len, factor=factor, bias=bias,
            affine=affine, eps=eps, crop=crop, aesthetic_score=aesthetic_score,
        )  # fmt: skip
        check_sizes(MAX_WIDTH, heads=heads, conv_heads=conv_heads, ff_dim=ff_dim)
        check_sizes(MAX_LAYERS, depth=depth, conv_blocks=conv_blocks)
        check_divisible("dim", dim, heads)
        check_divisible("channels", channels, conv_heads)
        self.encoder_proj = nn.Linear(text_embed_dim, dim, bias=bias)
        for half in (self.down_block, self.up_block):
            half["res_blocks"] = nn.ModuleList(
                ConvBlock(channels, dim, bias, affine, eps) for _ in range(conv_blocks)
            )
            half["attention_blocks"] = nn.ModuleList(
                TextBlock(channels, conv_heads, dim, bias) for _ in range(conv_blocks)
            )
        self.transformer_layers = nn.ModuleList(
            Layer(dim, heads, ff_dim, bias, affine, eps) for _ in range(depth)
        )

    def _text(self, states: Float[Tensor, "R L E"]) -> Float[Tensor, "R L D"]:
        return self.encoder_proj(states)

    def _constants(
        self, text: Float[Tensor, "R L D"], cond: Float[Tensor, "R D"]
    ) -> list[Constants]:
        """What every block makes of them, in the order of the blocks."""
        return [block.constants(text, cond) for block in self._blocks]

    @property
    def _blocks(self) -> list[Any]:
        """All that have constants, in their order."""
        return [*_pairs(self.down_block), *self.transformer_layers, *_pairs(self.up_block)]

    def encode_context(self, *branches: Conditioning) -> AmusedContext:
        """As of `ClipTransformer`."""
        made = super().encode_context(*branches)
        return AmusedContext(made.parts, made.grid, values=[each.values for each in self._blocks])

    def _between(
        self,
        x: Float[Tensor, "R n C"],
        grid: tuple[int, int],
        parts: list[Constants],
        shared: Constants,
    ) -> Float[Tensor, "R n C"]:
        constants = iter(parts)

        def run(blocks: Iterable[Any], x: Tensor) -> Tensor:
            for block in blocks:
                sees = {"sees": shared[0]} if shared and block.values else {}
                x = block(x, grid, *next(constants), **sees)
            return x

        x = run(_pairs(self.down_block), x)
        x = self.project_to_hidden(self.project_to_hidden_norm(x))
        x = run(self.transformer_layers, x)
        x = self.project_from_hidden(self.project_from_hidden_norm(x))
        return run(_pairs(self.up_block), x)


def _pairs(half: Any) -> Iterator[Any]:
    """Blocks of a convolutional half: each of the convolutional ones, then one with text."""
    for pair in zip(half["res_blocks"], half["attention_blocks"], strict=True):
        yield from pair
