"""Building blocks of the masked transformers: attention, feed-forward, block.

All attention goes through `attend`, the one place to plug in other kernels. Linears are plain,
named ``nn.Linear``s, so that LoRA and quantisation can swap them. Pre-norm, QK-norm, gated MLP, no
biases, output projections that start at zero: choices known to train stably (none is in the
paper, which names only self-attention, cross-attention and MLP, 2.3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

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


def _zero_linear(dim_in: int, dim_out: int) -> nn.Linear:
    linear = nn.Linear(dim_in, dim_out, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def taken(x: Float[Tensor, "R N D"], at: Int[Tensor, "R K"]) -> Float[Tensor, "R K D"]:
    """The positions ``at`` of each row."""
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _split_heads(x: Tensor, dim_head: int) -> Tensor:
    return x.unflatten(-1, (-1, dim_head)).transpose(1, 2)  # b n (h d) -> b h n d


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.dim_head = dim_head
        self.norm = norm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.q_norm, self.k_norm = norm(dim_head), norm(dim_head)
        self.to_out = _zero_linear(heads * dim_head, dim)

    def forward(
        self, x: Float[Tensor, "B N D"], at: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B K D"]:
        """All attend to all; with ``at``, only these positions' outputs are computed."""
        q, k, v = self.to_qkv(self.norm(x)).chunk(3, -1)
        q = q if at is None else taken(q, at)
        q, k, v = (_split_heads(t, self.dim_head) for t in (q, k, v))
        out = attend(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v)
        return self.to_out(out.transpose(1, 2).flatten(2))


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
        self.to_out = _zero_linear(heads * dim_head, dim)

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


class FeedForward(nn.Module):
    """Gated MLP (GEGLU) of width ``inner``."""

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.norm = norm(dim)
        self.to_hidden = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = _zero_linear(inner, dim)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        value, gate = self.to_hidden(self.norm(x)).chunk(2, dim=-1)
        return self.to_out(value * F.gelu(gate))


class Block(nn.Module):
    """Self-attention, cross-attention (unless ``cross`` is off) and MLP, each around a skip."""

    def __init__(self, dim: int, heads: int, dim_head: int, ff_dim: int, cross: bool = True):
        super().__init__()
        self.attn = SelfAttention(dim, heads, dim_head)
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
    ) -> Float[Tensor, "R K D"]:
        """One layer.

        Args:
            x: hidden states; those of one branch where the context's branches are still equal.
            context: the `transformer.Context`, if there is cross-attention.
            layer: the number of this layer in it.
            at: positions whose outputs are wanted; all by default.
        """
        x = (x if at is None else taken(x, at)) + self.attn(x, at)
        if self.cross is not None:
            x = context.branched(x)
            x = x + context.attend(layer, self.cross, x)
        return x + self.ff(x)
