"""Meissonic's transformer (Bai et al. 2024, arXiv 2410.08261), and Monetico's, under their names.

Flux's blocks over image and text tokens, between the same tokens in and logits out as aMUSEd's.
First come blocks with two streams: text and image have weights of their own, but attend to
themselves and each other. Then blocks of one stream, in which attention and MLP are computed side
by side. In both, one vector scales, shifts and gates everything: the pooled text with the
micro-conditions, and the time. Positions turn queries and keys (RoPE) by three numbers: 0, row and
column, all 0 for texts.

The time is the number of sampling steps that follow, so this part changes from step to step, and
with it all that is computed of the text: only the text's states and the rest of the vector are
constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
    Vector,
    check_divisible,
    check_sizes,
    embedded,
    modulated,
)

EPS = 1e-6
NUMBER_DIM = 256  # width of a number's embedding: of the time, of a micro-condition
SHARE_IN_TRAINING = 1000  # what the share of masked tokens is multiplied by, to be the time


class Norm(nn.Module):
    """A norm, and a linear map of the vector to what scales, shifts and gates."""

    def __init__(self, dim: int, parts: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.linear = nn.Linear(dim, parts * dim)
        self.parts = parts

    def forward(
        self, x: Float[Tensor, "R N D"], vector: Float[Tensor, "R D"]
    ) -> tuple[Tensor, ...]:
        """The states after norm, scale and shift; the other parts of the map, (R, 1, D) each."""
        shift, scale, *rest = self.linear(vector)[:, None].chunk(self.parts, dim=-1)
        return modulated(self.norm(x), torch.cat([scale, shift], dim=-1)), *rest


class Attention(nn.Module):
    """Of all tokens to all: image tokens, and before them text tokens with weights of their own."""

    def __init__(self, dim: int, heads: int, joint: bool):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads, EPS) for _ in range(2))
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (
                nn.Linear(dim, dim) for _ in range(3)
            )
            self.norm_added_q, self.norm_added_k = (nn.RMSNorm(dim // heads, EPS) for _ in range(2))
            self.to_out, self.to_add_out = nn.ModuleList([nn.Linear(dim, dim)]), nn.Linear(dim, dim)

    def _split(self, x: Float[Tensor, "R N D"]) -> Float[Tensor, "R H N d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "R N D"],
        turns: Constants,
        text: Float[Tensor, "R L D"] | None = None,
    ) -> Float[Tensor, "R M D"]:
        """What each of the M = L + N tokens attends to, before the output's projection."""
        q, k, v = (self._split(to(x)) for to in (self.to_q, self.to_k, self.to_v))
        q, k = _normed(self.norm_q, q), _normed(self.norm_k, k)
        if text is not None:
            projections = self.add_q_proj, self.add_k_proj, self.add_v_proj
            more_q, more_k, more_v = (self._split(to(text)) for to in projections)
            q = torch.cat([_normed(self.norm_added_q, more_q), q], dim=2)
            k = torch.cat([_normed(self.norm_added_k, more_k), k], dim=2)
            v = torch.cat([more_v, v], dim=2)
        out = attend(turned(q, turns).to(v.dtype), turned(k, turns).to(v.dtype), v)
        return out.transpose(1, 2).flatten(2)


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """In the precision of the norm's weight: layers may compute in a lower one."""
    return norm(x.to(norm.weight.dtype))


def turned(x: Float[Tensor, "R H N d"], turns: Constants) -> Float[Tensor, "R H N d"]:
    """Each pair of neighbouring numbers, turned by its angle."""
    cos, sin = turns
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


def angles(
    axes: Sequence[int], places: Int[Tensor, "a N"]
) -> tuple[Float[Tensor, "N half"], Float[Tensor, "N half"]]:
    """Cosines and sines by which tokens are turned.

    Args:
        axes: how many of a head's d numbers each axis turns, even.
        places: of the tokens, on each axis.

    Returns:
        for each of the d / 2 pairs.
    """
    found = []
    for width, place in zip(axes, places, strict=True):
        powers = torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width
        found.append(place[:, None] * 10_000.0**-powers)
    turns = torch.cat(found, dim=1)
    return turns.cos().float(), turns.sin().float()


class Mlp(nn.ModuleDict):
    """Under diffusers' names: "net.1" is its dropout."""

    def __init__(self, dim: int):
        wide = nn.ModuleDict({"proj": nn.Linear(dim, 4 * dim)})
        super().__init__({"net": nn.ModuleDict({"0": wide, "2": nn.Linear(4 * dim, dim)})})

    def forward(self, x: Float[Tensor, "R N D"]) -> Float[Tensor, "R N D"]:
        net: Any = self["net"]
        return net["2"](F.gelu(net["0"]["proj"](x), approximate="tanh"))


class DoubleBlock(nn.Module):
    """Attention and MLP, around skips, of two streams that meet in the attention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm1_context = Norm(dim, 6), Norm(dim, 6)
        self.attn = Attention(dim, heads, joint=True)
        self.norm2, self.norm2_context = (
            nn.LayerNorm(dim, EPS, elementwise_affine=False) for _ in range(2)
        )
        self.ff, self.ff_context = Mlp(dim), Mlp(dim)

    def forward(
        self,
        text: Float[Tensor, "R L D"],
        x: Float[Tensor, "R N D"],
        vector: Float[Tensor, "R D"],
        turns: Constants,
    ) -> tuple[Float[Tensor, "R L D"], Float[Tensor, "R N D"]]:
        y, *mine = self.norm1(x, vector)
        words, *theirs = self.norm1_context(text, vector)
        read = self.attn(y, turns, words)
        length = text.shape[1]
        text = text + theirs[0] * self.attn.to_add_out(read[:, :length])
        x = x + mine[0] * self.attn.to_out[0](read[:, length:])
        text = self._through(text, self.norm2_context, self.ff_context, *theirs[1:])
        return text, self._through(x, self.norm2, self.ff, *mine[1:])

    @staticmethod
    def _through(
        x: Tensor, norm: nn.Module, mlp: nn.Module, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Tensor:
        return x + gate * mlp(norm(x) * (1 + scale) + shift)


class SingleBlock(nn.Module):
    """Attention and MLP side by side, around one skip."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = Norm(dim, 3)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.attn = Attention(dim, heads, joint=False)
        self.proj_out = nn.Linear(5 * dim, dim)

    def forward(
        self, x: Float[Tensor, "R M D"], vector: Float[Tensor, "R D"], turns: Constants
    ) -> Float[Tensor, "R M D"]:
        y, gate = self.norm(x, vector)
        wide = F.gelu(self.proj_mlp(y), approximate="tanh")
        return x + gate * self.proj_out(torch.cat([self.attn(y, turns), wide], dim=-1))


class TimeAndText(nn.Module):
    """The parts of the vector, under diffusers' names."""

    def __init__(self, dim: int):
        super().__init__()
        self.timestep_embedder, self.text_embedder = Vector(NUMBER_DIM, dim), Vector(dim, dim)


class MeissonicTransformer(ClipTransformer):
    """Meissonic's and Monetico's transformer.

    Args:
        depth: blocks of two streams.
        single_depth: blocks of one stream after them.
        heads: attention heads.
        axes: how many of a head's numbers turn with each of the three positions, even.
        num_tokens: as of `ClipTransformer`, and so is all that follows.

    Raises:
        ValueError: numbers that do not fit together.
    """

    block_types = (DoubleBlock, SingleBlock)
    timed = True

    def __init__(
        self,
        *,
        num_tokens: int,
        seq_len: int,
        mask_id: int,
        num_embeddings: int,
        dim: int,
        depth: int,
        single_depth: int,
        heads: int,
        axes: Sequence[int],
        resample: bool,
        text_embed_dim: int,
        pooled_dim: int,
        text_encoder: str,
        max_text_len: int = 77,
        factor: int = 16,
        crop: Sequence[int] = (0, 0),
        aesthetic_score: float = 6.0,
    ):
        super().__init__(
            num_tokens=num_tokens, seq_len=seq_len, mask_id=mask_id, num_embeddings=num_embeddings,
            dim=dim, channels=dim, embed_dim=dim, resample=resample, text_embed_dim=text_embed_dim,
            pooled_dim=pooled_dim, micro_dim=NUMBER_DIM, text_encoder=text_encoder,
            max_text_len=max_text_len, factor=factor, bias=False, affine=True, eps=EPS, crop=crop,
            aesthetic_score=aesthetic_score,
        )  # fmt: skip
        check_sizes(MAX_WIDTH, heads=heads)
        check_sizes(MAX_LAYERS, depth=depth, single_depth=single_depth)
        check_divisible("dim", dim, heads)
        if len(axes) != 3 or any(width % 2 or width < 0 for width in axes):
            raise ValueError(f"axes {list(axes)} must be three even numbers")
        if sum(axes) * heads != dim:
            raise ValueError(f"axes {list(axes)} must add up to the {dim // heads} of a head")
        self.axes = list(axes)
        self.context_embedder = nn.Linear(text_embed_dim, dim)
        self.time_text_embed = TimeAndText(dim)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(dim, heads) for _ in range(depth))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(dim, heads) for _ in range(single_depth)
        )

    def encode_context(self, *branches: Conditioning) -> ClipContext:
        """First phase: the text's states, the vector but for the time, and the angles."""
        context = super().encode_context(*branches)
        height, width = (side // self.side_step for side in context.grid)
        size = 3, self.max_text_len + height * width
        places = torch.zeros(size, dtype=torch.long, device="cpu")
        image = places[1:, self.max_text_len :].view(2, height, width)
        image[0] = torch.arange(height, device="cpu")[:, None]
        image[1] = torch.arange(width, device="cpu")
        turns = tuple(turn.to(self.device) for turn in angles(self.axes, places))
        return replace(context, shared=turns)

    def forward(
        self,
        ids: Int[Tensor, "B N"],
        context: ClipContext,
        self_cond: None = None,
        at: Int[Tensor, "B K"] | None = None,
        left: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "G B K D"]:
        """As of `ClipTransformer`.

        Args:
            left: the time: how many sampling steps of each row follow this one, as its pipeline
                counts. In training there are no steps; its time is then a thousand times the share
                of tokens that are masked, as in the training script that it was published with.
        """
        if left is None:
            time = SHARE_IN_TRAINING * (ids == self.mask_id).float().mean(dim=1)
        else:
            time = left.float()
        vector = self.time_text_embed.timestep_embedder(
            embedded(1000 * time, NUMBER_DIM).to(self.dtype)
        )
        [(text, cond)] = context.parts
        now = replace(context, parts=[(text, cond + vector)])
        return super().forward(ids, now, at=at)

    def _text(self, states: Float[Tensor, "R L E"]) -> Float[Tensor, "R L D"]:
        return self.context_embedder(states)

    def _constants(
        self, text: Float[Tensor, "R L D"], cond: Float[Tensor, "R D"]
    ) -> list[Constants]:
        return [(text, self.time_text_embed.text_embedder(cond))]

    def _between(
        self,
        x: Float[Tensor, "R n C"],
        grid: tuple[int, int],
        parts: list[Constants],
        shared: Constants,
    ) -> Float[Tensor, "R n C"]:
        [(text, cond)] = parts
        vector, length = F.silu(cond), text.shape[1]
        x = self.project_to_hidden(self.project_to_hidden_norm(x))
        for block in self.transformer_blocks:
            text, x = block(text, x, vector, shared)
        x = torch.cat([text, x], dim=1)
        for block in self.single_transformer_blocks:
            x = block(x, vector, shared)
        return self.project_from_hidden(self.project_from_hidden_norm(x[:, length:]))
