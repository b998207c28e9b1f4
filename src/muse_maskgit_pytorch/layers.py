"""Building blocks of the masked transformers: attention, feed-forward, block.

All attention goes through `attend`, the one place to plug in other kernels. Linears are plain,
named ``nn.Linear``s, so that LoRA and quantisation can swap them. Pre-norm, QK-norm, gated MLP, no
biases, output projections that start at zero: choices known to train stably (none is in the
paper, which names only self-attention, cross-attention and MLP, 2.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KeysValues = tuple[Tensor, Tensor]  # each (B, heads, length, dim_head)


def norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, bias=False)


def attend(
    q: Float[Tensor, "B H N d"],
    k: Float[Tensor, "B H M d"],
    v: Float[Tensor, "B H M d"],
    mask: Bool[Tensor, "B M"] | None = None,
) -> Float[Tensor, "B H N d"]:
    """Softmax attention through PyTorch's fused kernels (FlashAttention where it can run).

    Args:
        mask: True where a key may be seen. Each row must see at least one.
    """
    seen = None if mask is None else mask[:, None, None, :]
    if q.device.type == "cpu" and q.dtype != torch.float32:
        # in half precision, the CPU's fused kernel takes 4 times as long as two products for 64
        # tokens, and about as long for 256 (docs/log.md)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
        return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def zero_linear(dim_in: int, dim_out: int) -> nn.Linear:
    """One that gives nothing at first."""
    linear = nn.Linear(dim_in, dim_out, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def taken(x: Float[Tensor, "R N D"], at: Int[Tensor, "R K"]) -> Float[Tensor, "R K D"]:
    """The positions ``at`` of each row."""
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def turns(grid: tuple[int, int], dim_head: int, device: torch.device) -> Float[Tensor, "N half"]:
    """Angles, in radian, by which `turned` marks the places of a grid's tokens, row by row.

    Half of a head's pairs of channels turn with the row and half with the column, by 1 to 1/100
    radian a token: rotary embedding (Su et al. 2021) along two axes (Heo et al. 2024, "Rotary
    Position Embedding for Vision Transformer").
    """
    pairs = dim_head // 4
    speeds = 100 ** -(torch.arange(pairs, device=device) / pairs)
    row, column = (torch.arange(side, device=device)[:, None] * speeds for side in grid)
    places = row[:, None].expand(-1, grid[1], -1), column.expand(grid[0], -1, -1)
    return torch.cat(places, dim=-1).flatten(0, 1)


def turned(x: Float[Tensor, "... d"], angles: Float[Tensor, "... half"]) -> Float[Tensor, "... d"]:
    """Queries or keys turned by angles, so that their products know how far apart they are."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _split_heads(x: Tensor, dim_head: int) -> Tensor:
    return x.unflatten(-1, (-1, dim_head)).transpose(1, 2)  # b n (h d) -> b h n d


class SelfAttention(nn.Module):
    """Attention of an image's or a text's tokens to each other.

    Args:
        rotary: whether queries and keys are `turned` by their places.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, rotary: bool = False):
        super().__init__()
        self.dim_head, self.rotary = dim_head, rotary
        self.norm = norm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.q_norm, self.k_norm = norm(dim_head), norm(dim_head)
        self.to_out = zero_linear(heads * dim_head, dim)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        at: Int[Tensor, "B K"] | None = None,
        grid: tuple[int, int] | None = None,
        mask: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B K D"]:
        """All attend to all, whatever the ``grid``.

        Args:
            x: hidden states.
            at: positions whose outputs are computed; all by default.
            grid: height and width in tokens, a square by default.
            mask: which may be seen, at least one of each row; all by default.
        """
        q, k, v = self.to_qkv(self.norm(x)).chunk(3, -1)
        q = q if at is None else taken(q, at)
        q, k, v = (_split_heads(t, self.dim_head) for t in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            angles = turns(grid or _square(x), self.dim_head, x.device)
            q = turned(q, angles if at is None else angles[at].unsqueeze(1))
            k = turned(k, angles)
        out = attend(q.to(v.dtype), k.to(v.dtype), v, mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


def _square(x: Float[Tensor, "B N D"]) -> tuple[int, int]:
    side = math.isqrt(x.shape[1])
    return side, side


@dataclass(frozen=True)
class Windows:
    """An image's grid of tokens in windows, for half of the heads each in another way.

    A side of H tokens makes n = ceil(H / size) windows of p = ceil(H / n) tokens. For the first
    half of the heads, these are blocks of neighbours; for the second half, the tokens of a window
    lie over the whole side, at distance n. What a side lacks to n * p is padded.
    """

    grid: tuple[int, int]
    size: int

    @property
    def sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(n, p) of the height and of the width."""
        (height, width), size = self.grid, self.size
        n, m = -(-height // size), -(-width // size)  # rounded up
        return (n, -(-height // n)), (m, -(-width // m))

    def cut(self, x: Float[Tensor, "B N H d"]) -> Float[Tensor, "W h M d"]:
        """The heads of an image's tokens -> W = 2 * B * n * m windows of M tokens, h = H / 2."""
        (n, p), (m, q) = self.sides
        x = x.unflatten(1, self.grid)
        missing = m * q - x.shape[2], n * p - x.shape[1]
        if any(missing):
            x = F.pad(x, (0, 0, 0, 0, 0, missing[0], 0, missing[1]))
        near, far = x.chunk(2, dim=3)
        near = near.unflatten(2, (m, q)).unflatten(1, (n, p)).permute(0, 1, 3, 5, 2, 4, 6)
        far = far.unflatten(2, (q, m)).unflatten(1, (p, n)).permute(0, 2, 4, 5, 1, 3, 6)
        return torch.stack([near, far]).flatten(5, 6).flatten(0, 3)  # 2 b n m h (p q) d

    def seen(self, like: Float[Tensor, "B N D"]) -> Bool[Tensor, "W M"] | None:
        """Which tokens of the windows are the image's; None if all are."""
        if all(n * p == side for (n, p), side in zip(self.sides, self.grid, strict=True)):
            return None
        return self.cut(like.new_ones(*like.shape[:2], 2, 1))[:, 0, :, 0] > 0

    def join(self, x: Float[Tensor, "W h M d"]) -> Float[Tensor, "B N D"]:
        """The way back, with the heads side by side."""
        (n, p), (m, q) = self.sides
        near, far = x.unflatten(2, (p, q)).unflatten(0, (2, -1, n, m))  # b n m h p q d
        near, far = near.permute(0, 1, 4, 2, 5, 3, 6), far.permute(0, 4, 1, 5, 2, 3, 6)
        x = torch.cat([half.flatten(3, 4).flatten(1, 2) for half in (near, far)], dim=3)
        return x[:, : self.grid[0], : self.grid[1]].flatten(1, 2).flatten(2)


class MultiAxisAttention(SelfAttention):
    """Half of the heads attend within blocks of the image, half on a grid spread over all of it.

    The halves are HiT's (Zhao et al. 2021), the windows of a fixed size MaxViT's (Tu et al. 2022;
    there, blocks and grid take turns). Memory and time grow with the number of tokens, not with its
    square. Two layers join all tokens of sides up to ``size ** 2`` that need no padding.

    Args:
        size: of the windows; at most so many tokens a side, see `Windows`.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, size: int, rotary: bool = False):
        super().__init__(dim, heads, dim_head, rotary)
        self.size = size

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        at: Int[Tensor, "B K"] | None = None,
        grid: tuple[int, int] | None = None,
        mask: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B K D"]:
        """All attend in their windows of the grid, a square by default, whichever are wanted."""
        assert mask is None  # texts have masks, and no windows
        windows = Windows(grid or _square(x), self.size)
        q, k, v = self.to_qkv(self.norm(x)).unflatten(-1, (3, -1, self.dim_head)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            angles = turns(windows.grid, self.dim_head, x.device).unsqueeze(1)
            q, k = turned(q, angles), turned(k, angles)
        q, k, v = map(windows.cut, (q.to(v.dtype), k.to(v.dtype), v))
        out = windows.join(attend(q, k, v, windows.seen(x)))
        return self.to_out(out if at is None else taken(out, at))


class CrossAttention(nn.Module):
    """Attention to a context whose keys and values are computed once (`keys_values`).

    A learned null key and value precede the context, so that a row whose text is removed still has
    something to attend to; its output is then a constant.
    """

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.dim_head = dim_head
        self.norm = norm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.q_norm, self.k_norm = norm(dim_head), norm(dim_head)
        self.null_kv = nn.Parameter(torch.randn(2, heads, 1, dim_head))
        self.to_out = zero_linear(heads * dim_head, dim)

    def keys_values(self, context: Float[Tensor, "B M D"]) -> KeysValues:
        k, v = (_split_heads(t, self.dim_head) for t in self.to_kv(context).chunk(2, -1))
        null_k, null_v = self.null_kv.to(v.dtype).unsqueeze(1).expand(-1, len(k), -1, -1, -1)
        k = self.k_norm(torch.cat([null_k, k], dim=2)).to(v.dtype)
        return k, torch.cat([null_v, v], dim=2)

    @property
    def null_output(self) -> Float[Tensor, " D"]:
        """What comes out where nothing but the null key is seen, whatever the input."""
        return self.to_out(self.null_kv[1].flatten()[None])[0]

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        keys_values: KeysValues,
        mask: Bool[Tensor, "B M"] | None,
    ) -> Float[Tensor, "B N D"]:
        k, v = keys_values
        q = self.q_norm(_split_heads(self.to_q(self.norm(x)), self.dim_head))
        return self.to_out(attend(q.to(v.dtype), k, v, mask).transpose(1, 2).flatten(2))


class CodeHead(nn.Linear):
    """Logits of codes whose numbers have digits, as those of FSQ do.

    Codes with a digit in common share what it adds to their rows of the weight, so what is learnt
    of one helps with all that are near it.

    Args:
        dim: of the hidden states.
        levels: how many values each digit has, the one that counts least first.
    """

    def __init__(self, dim: int, levels: Sequence[int]):
        super().__init__(dim, math.prod(levels), bias=False)
        self.levels = tuple(levels)
        self.digits = nn.Parameter(torch.zeros(sum(levels), dim))

    @property
    def whole(self) -> Float[Tensor, "V D"]:
        """The weight with what the digits add."""
        table = self.weight.unflatten(0, self.levels[::-1])
        for place, part in enumerate(self.digits.split(self.levels)):
            table = table + part.unflatten(0, (-1, *[1] * place))
        return table.flatten(0, -2)

    def plain(self) -> nn.Linear:
        """The same head as one layer."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(self.whole.detach(), requires_grad=False)
        return made

    def forward(self, input: Float[Tensor, "*s D"]) -> Float[Tensor, "*s V"]:
        return F.linear(input, self.whole)


class FeedForward(nn.Module):
    """Gated MLP (GEGLU) of width ``inner``."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.norm = norm(dim)
        self.to_hidden = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = zero_linear(inner, dim)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        value, gate = self.to_hidden(self.norm(x)).chunk(2, dim=-1)
        return self.to_out(value * F.gelu(gate))


class Block(nn.Module):
    """Self-attention, cross-attention (unless ``cross`` is off) and MLP, each around a skip.

    With ``multi_axis``, the self-attention is `MultiAxisAttention` of this size. ``rotary``: see
    `SelfAttention`.

    Attributes:
        recomputed: keep only the input for the way back, and compute the rest again there.
    """

    recomputed = False

    def __init__(
        self, dim: int, heads: int, dim_head: int, ff_dim: int, cross: bool = True,
        multi_axis: int | None = None, rotary: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.attn = (
            SelfAttention(dim, heads, dim_head, rotary)
            if multi_axis is None
            else MultiAxisAttention(dim, heads, dim_head, multi_axis, rotary)
        )
        self.cross = CrossAttention(dim, heads, dim_head) if cross else None
        self.ff = FeedForward(dim, ff_dim)

    def keys_values(self, context: Float[Tensor, "B M D"]) -> KeysValues:
        """What the cross-attention attends to, computed once for all passes."""
        assert self.cross is not None
        return self.cross.keys_values(context)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        context: Any = None,
        layer: int = 0,
        at: Int[Tensor, "B K"] | None = None,
        grid: tuple[int, int] | None = None,
        mask: Bool[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "R K D"]:
        """One layer.

        Args:
            x: hidden states; those of one branch where the context's branches are still equal.
            context: the `transformer.Context`, if there is cross-attention.
            layer: the number of this layer in it.
            at: positions whose outputs are wanted; all by default.
            grid: height and width in tokens, where no context says so.
            mask: which tokens the self-attention may see; all by default.
        """
        grid = grid if context is None else context.grid
        if self.recomputed and torch.is_grad_enabled():
            made: Any = checkpoint(
                self._run, x, context, layer, at, grid, mask, use_reentrant=False
            )
            return made
        return self._run(x, context, layer, at, grid, mask)

    def _run(
        self, x: Tensor, context: Any, layer: int, at: Tensor | None, grid: tuple[int, int] | None,
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        x = (x if at is None else taken(x, at)) + self.attn(x, at, grid, mask)
        if self.cross is not None:
            x = context.branched(x)
            x = x + context.attend(layer, self.cross, x)
        return x + self.ff(x)
