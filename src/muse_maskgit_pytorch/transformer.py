"""The masked transformers: ids in, a distribution for every position out (paper 2.3, 2.4).

Two phases, so that what does not change over the sampling steps is computed once:
``context = transformer.encode_context(conditioning)`` holds every layer's cross-attention keys
and values, ``hidden = transformer(ids, context)`` is one pass, and ``to_logits`` reads the hidden
states where they are needed. Training composes the same calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .checkpoint import Saveable
from .layers import Block, KeysValues, norm
from .structures import Conditioning
from .text import DEFAULT_TEXT_ENCODER, embed_dim


@dataclass(frozen=True)
class Context:
    """What a transformer attends to: keys and values per layer, and which of them are real.

    And the image's grid of tokens, where it is not the trained square.
    """

    keys_values: list[KeysValues]
    mask: Bool[Tensor, "B M"]
    grid: tuple[int, int] | None = None

    def rows(self, rows: slice | Tensor) -> Context:
        """The context of some rows of the batch."""
        keys_values = [(k[rows], v[rows]) for k, v in self.keys_values]
        return Context(keys_values, self.mask[rows], self.grid)


class TokenEmbedding(nn.Module):
    """Token embedding plus learned 2-D positions (2.3), one table for rows and one for columns.

    A grid of another height or width reads the tables between their entries.
    """

    def __init__(self, num_tokens: int, seq_len: int, dim: int):
        super().__init__()
        side = math.isqrt(seq_len)
        if side * side != seq_len:
            raise ValueError(
                f"seq_len {seq_len} is no square: it must be fmap_size ** 2 of a square image, "
                f"such as {side**2} or {(side + 1) ** 2}"
            )
        self.token = nn.Embedding(num_tokens, dim)
        self.row = nn.Parameter(torch.zeros(side, 1, dim))
        self.column = nn.Parameter(torch.zeros(1, side, dim))
        for table in (self.token.weight, self.row, self.column):
            nn.init.normal_(table, std=dim**-0.5)

    def forward(
        self, ids: Int[Tensor, "B N"], grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "B N D"]:
        row, column = self.row, self.column
        if grid is not None and grid != (len(row), column.shape[1]):
            row = _stretched(row[:, 0], grid[0])[:, None]
            column = _stretched(column[0], grid[1])[None]
        positions = (row + column).flatten(0, 1)
        if ids.shape[1] != len(positions):
            raise ValueError(f"{ids.shape[1]} tokens given to a model of seq_len {len(positions)}")
        return self.token(ids) + positions


def _stretched(table: Float[Tensor, "n D"], size: int) -> Float[Tensor, "m D"]:
    """Positions for a side of another length: the same edges, linear in between."""
    return F.interpolate(table.T[None], size, mode="linear", align_corners=True)[0].T


class LowResEncoder(nn.Module):
    """Low-resolution tokens through self-attention layers of their own (2.4).

    With ``depth`` 0 the embedded tokens and their positions are passed on as they are.
    """

    def __init__(
        self, num_tokens: int, seq_len: int, dim: int, depth: int, heads: int, dim_head: int,
        ff_mult: float,
    ):  # fmt: skip
        super().__init__()
        self.num_tokens, self.seq_len = num_tokens, seq_len
        self.embed = TokenEmbedding(num_tokens, seq_len, dim)
        blocks = [Block(dim, heads, dim_head, ff_mult, cross=False) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, ids: Int[Tensor, "B M"], grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "B M D"]:
        x = self.embed(ids, grid)
        for block in self.blocks:
            x = block(x)
        return x


class MaskGitTransformer(Saveable):
    """Predicts masked image tokens from the others, the text and, perhaps, a low-res image.

    Args:
        num_tokens: codebook size V of the tokenizer; the mask token is one more.
        seq_len: N, the square of the tokenizer's ``fmap_size``.
        dim: width D.
        depth: blocks of self-attention, cross-attention and MLP.
        dim_head: width of an attention head.
        heads: attention heads.
        ff_mult: width of the MLP as a multiple of ``dim``.
        t5_name: text encoder, by Hugging Face name or path.
        text_embed_dim: E; read from the text encoder's configuration unless given.
        max_text_len: captions are cut after this many text tokens.
        self_cond: feed the previous pass's hidden states back in (Analog Bits, Chen et al. 2022).
        cond_depth: layers of the low-resolution encoder, used by super-resolution only; half of
            ``depth`` by default, the paper's 16 to 32 (table 6).

    Raises:
        ValueError: a count below 1, a ``seq_len`` that is no square, a text encoder that cannot
            be had while ``text_embed_dim`` is not given.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        seq_len: int,
        dim: int,
        depth: int,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: float = 4,
        t5_name: str = DEFAULT_TEXT_ENCODER,
        text_embed_dim: int | None = None,
        max_text_len: int = 256,
        self_cond: bool = False,
        cond_depth: int | None = None,
    ):
        super().__init__()
        counts = dict(num_tokens=num_tokens, seq_len=seq_len, dim=dim, depth=depth)
        counts |= dict(dim_head=dim_head, heads=heads, max_text_len=max_text_len)
        counts |= {} if text_embed_dim is None else dict(text_embed_dim=text_embed_dim)
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if cond_depth is not None and cond_depth < 0:
            raise ValueError(f"cond_depth must not be negative, but is {cond_depth}")
        self.num_tokens, self.seq_len, self.dim = num_tokens, seq_len, dim
        self.mask_id = num_tokens
        self.t5_name, self.max_text_len = t5_name, max_text_len
        self.text_embed_dim = text_embed_dim or embed_dim(t5_name)
        self._init_args["text_embed_dim"] = self.text_embed_dim  # rebuilt without the encoder
        self.self_cond = self_cond
        self._block_args = (heads, dim_head, ff_mult)
        self.cond_depth = math.ceil(depth / 2) if cond_depth is None else cond_depth

        self.embed = TokenEmbedding(num_tokens + 1, seq_len, dim)
        self.text_proj = nn.Linear(self.text_embed_dim, dim, bias=False)
        self.text_norm = norm(dim)
        self.self_cond_proj = nn.Linear(dim, dim, bias=False) if self_cond else None
        blocks = [Block(dim, *self._block_args) for _ in range(depth)]
        self.blocks: Any = nn.ModuleList(blocks)
        self.norm = norm(dim)
        self.to_logits = self.make_head()
        self.cond_encoder: LowResEncoder | None = None

    def make_head(self) -> nn.Linear:
        """No bias: so guidance commutes with the head and may be applied before it."""
        return nn.Linear(self.dim, self.num_tokens, bias=False)

    def add_cond_encoder(self, num_tokens: int, seq_len: int) -> None:
        """Give the transformer its low-resolution encoder (`MaskGit` does, for super-resolution).

        Args:
            num_tokens: codebook size of the low-resolution tokenizer.
            seq_len: M, the number of low-resolution tokens.
        """
        existing = self.cond_encoder
        if existing is None:
            self.cond_encoder = LowResEncoder(
                num_tokens, seq_len, self.dim, self.cond_depth, *self._block_args
            ).to(self.device)
        elif (existing.num_tokens, existing.seq_len) != (num_tokens, seq_len):
            raise ValueError(
                f"the transformer already reads {existing.seq_len} low-resolution tokens of "
                f"{existing.num_tokens} codes, not {seq_len} of {num_tokens}: make a new one"
            )

    def _load_state(self, state: dict[str, Tensor], path: Any) -> None:
        name = "cond_encoder.embed"
        if self.cond_encoder is None and f"{name}.token.weight" in state:
            # a super-resolution transformer saved alone: its encoder is no constructor argument
            num_tokens, side = len(state[f"{name}.token.weight"]), len(state[f"{name}.row"])
            self.add_cond_encoder(num_tokens, side**2)
        super()._load_state(state, path)

    def encode_context(self, conditioning: Conditioning) -> Context:
        """First phase: everything that does not depend on the image tokens."""
        text = conditioning.text
        if text.embeds.shape[-1] != self.text_embed_dim:
            raise ValueError(
                f"text_embeds have width {text.embeds.shape[-1]}, the transformer reads "
                f"{self.text_embed_dim} (from {self.t5_name!r} or text_embed_dim)"
            )
        context = self.text_norm(self.text_proj(text.embeds))
        mask = text.mask & conditioning.keep[:, None]
        if (conditioning.cond_ids is None) != (self.cond_encoder is None):
            needs = "needs" if conditioning.cond_ids is None else "takes no"
            raise ValueError(f"this transformer {needs} low-resolution tokens (cond_ids)")
        if self.cond_encoder is not None:
            cond = self.text_norm(self.cond_encoder(conditioning.cond_ids, conditioning.cond_grid))
            context = torch.cat([cond, context], dim=1)
            mask = torch.cat([mask.new_ones(cond.shape[:2]), mask], dim=1)
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)  # the null key
        keys_values = [block.keys_values(context) for block in self.blocks]
        return Context(keys_values, mask, conditioning.grid)

    def forward(
        self,
        ids: Int[Tensor, "B N"],
        context: Context,
        self_cond: Float[Tensor, "B N D"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Second phase: normalised hidden states, which `to_logits` reads.

        Args:
            ids: tokens, ``mask_id`` where unknown.
            self_cond: hidden states of the previous pass; zeros on the first.
        """
        x = self.embed(ids, context.grid)
        if self.self_cond_proj is not None:
            # the product with zeros keeps the weights in every graph (DistributedDataParallel)
            x = x + self.self_cond_proj(torch.zeros_like(x) if self_cond is None else self_cond)
        for block, keys_values in zip(self.blocks, context.keys_values, strict=True):
            x = block(x, keys_values, context.mask)
        return self.norm(x)


class TokenCritic(MaskGitTransformer):
    """A second transformer that tells real tokens from sampled ones (Lezama et al. 2022).

    Same arguments as `MaskGitTransformer`; its ``to_logits`` gives one score (B, N, 1), high where
    a token looks real.
    """

    def make_head(self) -> nn.Linear:
        return nn.Linear(self.dim, 1, bias=False)


class SelfCritic(nn.Module):
    """The critic as a second head on the generating transformer itself.

    Called like a `TokenCritic`: ``critic.to_logits(critic(ids, context))``.
    """

    def __init__(self, transformer: MaskGitTransformer):
        super().__init__()
        self._transformer = [transformer]  # in a list: its weights belong to the MaskGit already
        self.to_logits = nn.Linear(transformer.dim, 1, bias=False)

    def encode_context(self, conditioning: Conditioning) -> Context:
        return self._transformer[0].encode_context(conditioning)

    def forward(self, ids: Int[Tensor, "B N"], context: Context) -> Float[Tensor, "B N D"]:
        return self._transformer[0](ids, context)
