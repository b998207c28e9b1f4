"""The masked transformers: ids in, a distribution for every position out (paper 2.3, 2.4).

Two phases, so that what does not change over the sampling steps is computed once:
``context = transformer.encode_context(conditioning)`` holds every layer's cross-attention keys
and values, ``hidden = transformer(ids, context)`` is one pass, and ``to_logits`` reads the hidden
states where they are needed. Training makes the same calls, with a context of one branch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .arguments import MAX_LAYERS, MAX_TOKENS, MAX_WIDTH, real, shown, whole
from .checkpoint import Saveable
from .layers import Block, CodeHead, CrossAttention, KeysValues, norm, taken, zero_linear
from .structures import Conditioning, TextEmbeds
from .text import (
    DEFAULT_TEXT_ENCODER,
    ClassLabels,
    TextEncoder,
    class_names,
    embed_dim,
    get_text_encoder,
)


@dataclass(frozen=True)
class Context:
    """What a transformer attends to: G branches (of the guidance) of B rows.

    Attributes:
        keys_values: of every layer; of the branches that see any.
        mask: which of them are real.
        text_start: position of the first text token, after the null key and the low resolution.
        grid: the image's grid of tokens, if not the trained square.
        blank: how many further branches see nothing but the null key. Their cross-attention is
            one vector per layer, so it needs neither queries nor keys.
        whole: whether all of the mask is True, and so need not be looked at.
        sees: whose queries, keys and mask each row of the branches that see something takes, by
            their number; None: its own.
        added: of every layer, values that are attended to besides, with maps of the row's own.
    """

    keys_values: list[KeysValues]  # each (G - blank, B, heads, M, dim_head)
    mask: Bool[Tensor, "G B M"]
    text_start: int = 1
    grid: tuple[int, int] | None = None
    blank: int = 0
    whole: bool = False
    sees: Int[Tensor, " R"] | None = None
    added: Sequence[Tensor] = ()

    @property
    def num_branches(self) -> int:
        """G"""
        return len(self.mask) + self.blank

    def branched(self, x: Float[Tensor, "r N D"]) -> Float[Tensor, "R N D"]:
        """The R = G * B rows of all branches, from those or from B that all branches share."""
        branches = self.num_branches * self.mask.shape[1] // len(x)
        return x if branches == 1 else x.repeat(branches, 1, 1)

    def attend(
        self, layer: int, cross: CrossAttention, x: Float[Tensor, "R N D"]
    ) -> Float[Tensor, "R N D"]:
        """A layer's cross-attention, for the R = G * B rows of all branches."""
        if not self.blank:
            return self._attend(layer, cross, x)
        rows = len(self.mask) * self.mask.shape[1]
        seeing = self._attend(layer, cross, x[:rows])
        nothing = cross.null_output.to(seeing.dtype).expand(len(x) - rows, *x.shape[1:])
        return torch.cat([seeing, nothing])

    def _attend(self, layer: int, cross: CrossAttention, x: Tensor) -> Tensor:
        """The same for the branches that see something."""
        k, v = (t.flatten(0, 1) for t in self.keys_values[layer])
        mask = None if self.whole else self.mask.flatten(0, 1)
        if self.sees is None:
            return cross(x, (k, v), mask)
        at = self.sees
        output = cross(x[at], (k[at], v), mask if mask is None else mask[at])
        if self.added:
            output = output + cross(x, (k, self.added[layer].flatten(0, 1)), mask)
        return output

    # Values of the text's tokens, for `words`

    @property
    def text_values(self) -> list[Float[Tensor, "G B heads L dim_head"]]:
        """Of every layer; of the branches that see any."""
        return [v[:, :, :, self.text_start :] for _, v in self.keys_values]

    def with_text_values(
        self,
        values: Sequence[Tensor],
        sees: Int[Tensor, " R"] | None = None,
        added: Sequence[Tensor] = (),
    ) -> Self:
        """The same with other values of the text's tokens.

        Args:
            values: in the place of `text_values`.
            sees: see there.
            added: likewise, as `text_values` are; all others are 0.
        """
        start = self.text_start
        layers = zip(self.keys_values, values, strict=True)
        made = [(k, torch.cat([v[:, :, :, :start], new], dim=3)) for (k, v), new in layers]
        added = [F.pad(extra, (0, 0, start, 0)) for extra in added]
        return replace(self, keys_values=made, sees=sees, added=added)

    def _map(self, function: Callable[..., Tensor], *others: Context) -> Context:
        """Apply a function to the keys, to the values and to the mask, of all contexts alike."""
        layers = zip(self.keys_values, *(other.keys_values for other in others), strict=True)
        keys_values = [
            (function(*(k for k, _ in layer)), function(*(v for _, v in layer))) for layer in layers
        ]
        mask = function(self.mask, *(other.mask for other in others))
        return replace(self, keys_values=keys_values, mask=mask)

    def rows(self, rows: slice | Tensor) -> Context:
        """The context of some rows of the batch."""
        return self._map(lambda x: x[:, rows].contiguous())

    def branches(self, count: int) -> Context:
        """The first ``count`` branches alone."""
        seeing = len(self.mask)
        if count < seeing:
            sees = None if self.sees is None else self.sees[: count * self.mask.shape[1]]
            added = [extra[:count] for extra in self.added]
            return replace(self._map(lambda x: x[:count]), blank=0, sees=sees, added=added)
        return self if count == self.num_branches else replace(self, blank=count - seeing)

    def cat(self, other: Context) -> Context:
        """Another batch's rows after these; see `sampling.contract.Context`.

        In a context with fewer branches than the other, those that it lacks are blank.
        """
        most = max(len(self.mask), len(other.mask))
        blank = max(self.num_branches, other.num_branches) - most
        pair = [context._written_out(most - len(context.mask)) for context in (self, other)]
        return replace(self._join(1, pair), blank=blank)

    @staticmethod
    def stack(contexts: Sequence[Context]) -> Context:
        """Contexts of the same rows as the branches of one; blank ones come last."""
        blank = sum(context.blank for context in contexts)
        return replace(contexts[0]._join(0, contexts), blank=blank)

    def _written_out(self, extra: int) -> Context:
        """With ``extra`` of the blank branches as if they saw something: the null key."""
        if not extra:
            return self
        context = self._map(lambda x: torch.cat([x, *[x[:1]] * extra]))
        context.mask[-extra:, :, 1:] = False
        return replace(context, whole=False)

    def _join(self, axis: int, contexts: Sequence[Context]) -> Context:
        length = max(context.mask.shape[-1] for context in contexts)
        padded = [context.padded(length) for context in contexts]
        joined = padded[0]._map(lambda *x: torch.cat(x, dim=axis), *padded[1:])
        return replace(joined, whole=all(context.whole for context in padded))

    def padded(self, length: int) -> Context:
        """With positions that nothing attends to, up to a length."""
        extra = length - self.mask.shape[-1]
        if not extra:
            return self
        mask = F.pad(self.mask, (0, extra))
        padded = [tuple(F.pad(t, (0, 0, 0, extra)) for t in pair) for pair in self.keys_values]
        return replace(self, keys_values=padded, mask=mask, whole=not len(mask))


class TokenEmbedding(nn.Module):
    """Token embedding plus learned 2-D positions (2.3), one table for rows and one for columns.

    For a grid of another height or width, the tables are interpolated.

    Args:
        num_tokens: ids, the mask's among them.
        seq_len: of the trained square.
        dim: width.
        levels: of the digits of codes (`CodeHead`), which then add to the embeddings.
    """

    def __init__(self, num_tokens: int, seq_len: int, dim: int, levels: Sequence[int] = ()):
        super().__init__()
        self.levels = tuple(levels)
        self.digits = nn.Parameter(torch.zeros(sum(levels), dim)) if levels else None
        side = math.isqrt(seq_len)
        if side * side != seq_len:
            raise ValueError(
                f"seq_len {seq_len} is not a perfect square: it must be fmap_size ** 2 of a square "
                f"image, such as {side**2} or {(side + 1) ** 2}"
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
        x = self.token(ids) + positions
        if self.digits is None:
            return x
        start, rest, known = 0, ids, (ids < math.prod(self.levels)).unsqueeze(-1)
        for level in self.levels:
            x = x + F.embedding(rest % level + start, self.digits) * known
            start, rest = start + level, rest // level
        return x


def _stretched(table: Float[Tensor, "n D"], size: int) -> Float[Tensor, "m D"]:
    """Positions for a side of another length: the same edges, linear in between."""
    return F.interpolate(table.T[None], size, mode="linear", align_corners=True)[0].T


class Patches(nn.Module):
    """Squares of tokens as one position each, and back.

    Each position is a linear map of its square's embeddings, each token a linear map of its
    position's state beside its own embedding. Between the two, everything is computed for a
    fraction of the positions, as in the narrow part of aMUSEd (Patil et al. 2024).

    Args:
        dim: width of tokens and positions.
        size: p, the side of the squares.
    """

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.size = size
        self.fold = nn.Linear(size**2 * dim, dim, bias=False)
        self.unfold = nn.Linear(dim, size**2 * dim, bias=False)

    def positions(self, x: Float[Tensor, "B N D"], grid: tuple[int, int]) -> Float[Tensor, "B n D"]:
        """Tokens of a grid -> n = N / p^2 positions."""
        height, width = grid
        cut = x.view(len(x), height // self.size, self.size, width // self.size, self.size, -1)
        return self.fold(cut.transpose(2, 3).flatten(3).flatten(1, 2))

    def tokens(
        self, states: Float[Tensor, "R n D"], x: Float[Tensor, "B N D"], grid: tuple[int, int]
    ) -> Float[Tensor, "R N D"]:
        """Positions -> tokens, beside those that came in, of which there may be fewer rows."""
        height, width = grid
        cut = self.unfold(states).view(
            len(states), height // self.size, width // self.size, self.size, self.size, -1
        )
        return cut.transpose(2, 3).reshape(len(states), height * width, -1) + x.repeat(
            len(states) // len(x), 1, 1
        )


class LowResEncoder(nn.Module):
    """Low-resolution tokens through self-attention layers of their own (2.4).

    With ``depth`` 0, the embedded tokens and their positions are passed on unchanged.
    """

    def __init__(
        self, num_tokens: int, seq_len: int, dim: int, depth: int, heads: int, dim_head: int,
        ff_dim: int, rotary: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.num_tokens, self.seq_len = num_tokens, seq_len
        self.embed = TokenEmbedding(num_tokens, seq_len, dim)
        blocks = [
            Block(dim, heads, dim_head, ff_dim, cross=False, rotary=rotary) for _ in range(depth)
        ]
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self, ids: Int[Tensor, "B M"], grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "B M D"]:
        x = self.embed(ids, grid)
        for block in self.blocks:
            x = block(x, grid=grid)
        return x


class MaskedTransformer(Saveable):
    """What the rest asks of a masked transformer: ours, another project's or one of your own.

    A subclass sets the first five attributes in its constructor and defines `encode_context`,
    ``forward`` and ``to_logits``; then `MaskGit` trains it, samples and edits with it, and `Muse`
    draws with it. What it is conditioned on is its own affair: it reads texts by an encoder of its
    choice, or classes, and may add what it likes to them. Weights and arguments are saved as of
    any `Saveable`.

    Attributes:
        num_tokens: codebook size V of the tokenizer.
        seq_len: N of the trained square.
        mask_id: what stands for "unknown" among the ids that it reads, V or above.
        dim: width D of its hidden states.
        text_embed_dim: width E of the texts' embeddings.
        text_encoder: name of what reads its texts, or the names of the classes.
        classes: names of the classes; () for an unconditional model, None for one that reads texts.
        max_text_len: tokens of a text that are read.
        side_step: sides in tokens must be multiples of it.
        block_types: classes of its blocks, whose linear layers may be computed in other precisions
            (`inference.precision`) and get adapters (`lora`); with none, it computes as it is.
        weighs_words: whether its contexts have `Context.text_values` and `with_text_values`, at the
            places that ``text_reader().words`` gives, so that `words` works on it.
        self_cond, partial, timed: see `sampling.contract.Network`.
    """

    num_tokens: int
    seq_len: int
    mask_id: int
    dim: int
    text_embed_dim: int
    classes: tuple[str, ...] | None = None
    max_text_len: int = 256
    side_step: int = 1
    block_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    weighs_words: bool = False
    self_cond: bool = False
    partial: bool = False
    timed: bool = False
    to_logits: Any  # hidden states (..., D) -> logits (..., V); affine

    @property
    def text_encoder(self) -> str | tuple[str, ...]:
        """What reads its texts (`get_text_encoder`)."""
        assert self.classes is not None
        return self.classes

    def text_reader(self) -> TextEncoder | ClassLabels:
        """The same, ready to read; all models of a process share it."""
        return get_text_encoder(self.text_encoder, self.max_text_len)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights: what comes in is converted to it."""
        return next(self.parameters()).dtype

    def with_low_resolution(self, num_tokens: int, seq_len: int) -> Self:
        """Itself, made to read low-resolution tokens: so many, of so many codes.

        Raises:
            ValueError: it cannot.
        """
        raise ValueError(
            f"a {type(self).__name__} reads no low-resolution tokens: it cannot be the transformer "
            "of a super-resolution stage"
        )

    def text_encoder_changed(self, encoder: TextEncoder) -> None:
        """Its texts come from another encoder now, such as one with an adapter (`Muse.load_lora`).

        To be overridden where the transformer keeps states of texts, in buffers.
        """

    def encode_context(self, *branches: Conditioning) -> Any:
        """First phase: everything that does not depend on the image tokens.

        Args:
            *branches: of the guidance, of the same rows; the last may have no text (None). In
                training there is one. A row sees its text where ``keep`` is True and at least one
                position of the text's mask is.

        Returns:
            a `sampling.contract.Context`, which ``forward`` reads.
        """
        raise NotImplementedError


class MaskGitTransformer(MaskedTransformer):
    """Predicts masked image tokens from the others, the text and, optionally, a low-res image.

    Args:
        num_tokens: codebook size V of the tokenizer; the mask token is one more.
        seq_len: N, the square of the tokenizer's ``fmap_size``.
        dim: width D.
        depth: blocks of self-attention, cross-attention and MLP.
        dim_head: width of an attention head.
        heads: attention heads.
        ff_mult: width of the MLP as a multiple of ``dim``. It is gated, and two thirds as wide to
            have as many weights, rounded up to a multiple of 8: other widths multiply slowly.
        ff_dim: the width of the gated MLP itself, in its place.
        t5_name: text encoder, by Hugging Face name or path.
        text_embed_dim: E; read from the text encoder's configuration unless given.
        classes: makes this class-conditional, without a text encoder: the names of the classes, or
            how many there are, their names then being "0", "1" and so on. Names, or indices, take
            the place of captions everywhere. 0: unconditional.
        max_text_len: captions are cut off after this many text tokens.
        text_depth: layers of self-attention and MLP, with rotary places, that texts go through
            before the cross-attention, which knows no order. In the states of MiniLM, which was
            trained to compare sentences, a word says which thing it is, and hardly which part it
            has in the sentence (`benchmarks/text_roles.py`). Prompts read in windows are longer
            than the texts that these layers know.
        self_cond: feed the previous pass's hidden states back in (Analog Bits, Chen et al. 2022).
        multi_axis: lets half of the heads of the image tokens' self-attention see blocks of up to
            this many tokens a side, and the other half as many spread over the image (2.4; the
            paper gives no size, 8 joins all tokens of 64 x 64 in two layers). By default, every
            token sees all. The low-resolution encoder attends in full either way.
        patch_size: folds squares of this many tokens a side into one position for all blocks:
            2 computes a quarter of the positions (`Patches`). Sides in tokens are then multiples of
            it.
        rotary: turns queries and keys of self-attention by their places (`layers.turns`), beside
            the learned positions: what a model knows of a thing in one place, it knows in all.
        code_levels: of FSQ the levels of its dimensions ([8, 8, 8, 8] of 4,096 codes), of LFQ and
            BSQ a 2 for each bit: codes that are equal in a dimension then share a part of their
            embedding, and of their row of the head (`CodeHead`), as MaskBit's bits do (Weber et
            al. 2024). By default every code is learnt by itself.
        cond_depth: layers of the low-resolution encoder, used by super-resolution only; half of
            ``depth`` by default, the paper's 16 to 32 (table 6).
        cond_num_tokens: codebook size of the low-resolution tokenizer. `MaskGit` fills in this
            and the next one for super-resolution (`with_low_resolution`).
        cond_seq_len: M, the number of low-resolution tokens.

    Raises:
        ValueError: a count below 1, a ``seq_len`` that is not a perfect square or whose side is not
            a multiple of ``patch_size``, ``multi_axis`` with an odd number of heads, a text encoder
            that is not available while ``text_embed_dim`` is not given.
    """

    _stated_always = ("text_embed_dim",)
    block_types = (Block,)
    weighs_words = True
    partial = True  # `sampling.contract.Network`

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
        ff_dim: int | None = None,
        t5_name: str = DEFAULT_TEXT_ENCODER,
        text_embed_dim: int | None = None,
        classes: int | Sequence[str] | None = None,
        max_text_len: int = 256,
        text_depth: int = 0,
        self_cond: bool = False,
        multi_axis: int | None = None,
        patch_size: int = 1,
        rotary: bool = False,
        code_levels: Sequence[int] | None = None,
        cond_depth: int | None = None,
        cond_num_tokens: int | None = None,
        cond_seq_len: int | None = None,
    ):
        super().__init__()
        widths: dict[str, int | None] = dict(dim=dim, dim_head=dim_head, heads=heads)
        widths |= dict(text_embed_dim=text_embed_dim, ff_dim=ff_dim)
        counts: dict[str, int | None] = dict(num_tokens=num_tokens, seq_len=seq_len)
        counts |= dict(cond_num_tokens=cond_num_tokens, cond_seq_len=cond_seq_len)
        counts |= dict(max_text_len=max_text_len)
        for given, most in ((widths, MAX_WIDTH), (counts, MAX_TOKENS)):
            for name, value in given.items():
                if value is not None:
                    whole(name, value, 1, most)
        whole("depth", depth, 1, MAX_LAYERS)
        whole("cond_depth", cond_depth or 0, 0, MAX_LAYERS)
        real("ff_mult", ff_mult, 2 / dim, MAX_LAYERS)
        if multi_axis is None:
            self._init_args.pop("multi_axis", None)  # files and fingerprints of before know none
        elif whole("multi_axis", multi_axis, 2, MAX_WIDTH) and heads % 2:
            raise ValueError(
                f"heads {heads} is odd: multi_axis halves the heads, so make it {heads + 1}"
            )
        self.side_step = whole("patch_size", patch_size, 1, MAX_WIDTH)
        if patch_size == 1:
            self._init_args.pop("patch_size", None)  # likewise
        elif math.isqrt(seq_len) % patch_size:
            raise ValueError(
                f"a side of {math.isqrt(seq_len)} tokens (seq_len {seq_len}) is not a multiple of "
                f"patch_size {patch_size}"
            )
        if not rotary:
            self._init_args.pop("rotary", None)  # likewise
        if not whole("text_depth", text_depth, 0, MAX_LAYERS):
            self._init_args.pop("text_depth", None)  # likewise
        if dim_head % 4 and (rotary or text_depth):
            raise ValueError(
                f"{'rotary' if rotary else 'text_depth'} needs a dim_head that is a multiple of 4, "
                f"not {dim_head}"
            )
        if code_levels is None:
            self._init_args.pop("code_levels", None)  # likewise
        else:
            if isinstance(code_levels, str) or not isinstance(code_levels, Sequence):
                raise ValueError(f"code_levels must be a list, not {shown(code_levels)}")
            code_levels = [
                whole(f"code_levels[{i}]", level, 1, MAX_TOKENS)
                for i, level in enumerate(code_levels)
            ]
            self._init_args["code_levels"] = code_levels
            if math.prod(code_levels) != num_tokens:
                raise ValueError(
                    f"code_levels {code_levels} make {math.prod(code_levels)} codes, and "
                    f"num_tokens is {num_tokens}"
                )
        self.code_levels = tuple(code_levels or ())
        if (cond_num_tokens is None) != (cond_seq_len is None):
            raise ValueError("cond_num_tokens and cond_seq_len belong together: give both")
        self.num_tokens, self.seq_len, self.dim = num_tokens, seq_len, dim
        self.mask_id = num_tokens
        self.t5_name, self.max_text_len = t5_name, max_text_len
        self.classes = None if classes is None else class_names(classes)
        if self.classes is not None:
            self._init_args["classes"] = list(self.classes)
            width = max(1, len(self.classes))
            if text_embed_dim not in (None, width):
                raise ValueError(
                    f"text_embed_dim {text_embed_dim} is given with {width} classes: leave it out"
                )
            text_embed_dim = width
        self.text_embed_dim: int = text_embed_dim or embed_dim(t5_name)
        self._init_args["text_embed_dim"] = self.text_embed_dim  # rebuilt without the encoder
        self.self_cond = self_cond
        width = ff_dim or math.ceil(int(dim * ff_mult * 2 / 3) / 8) * 8
        self._block_args, self.rotary = (heads, dim_head, width), rotary
        self.cond_depth = math.ceil(depth / 2) if cond_depth is None else cond_depth

        self.embed = TokenEmbedding(num_tokens + 1, seq_len, dim, self.code_levels)
        self.patches = Patches(dim, patch_size) if patch_size > 1 else None
        self.text_proj = nn.Linear(self.text_embed_dim, dim, bias=False)
        self.text_blocks: Any = nn.ModuleList(
            Block(dim, *self._block_args, cross=False, rotary=True) for _ in range(text_depth)
        )
        self.text_norm = norm(dim)
        # zero at first: states are several times as large as embeddings and would drown them
        self.self_cond_proj = zero_linear(dim, dim) if self_cond else None
        blocks = [
            Block(dim, *self._block_args, multi_axis=multi_axis, rotary=rotary)
            for _ in range(depth)
        ]
        self.blocks: Any = nn.ModuleList(blocks)
        self.norm = norm(dim)
        self.to_logits = self.make_head()
        self.cond_encoder: LowResEncoder | None = None
        self.cond_norm: nn.LayerNorm | None = None
        if cond_num_tokens is not None and cond_seq_len is not None:
            self._add_low_resolution(cond_num_tokens, cond_seq_len)

    @property
    def text_encoder(self) -> str | tuple[str, ...]:
        """What reads its texts (`get_text_encoder`)."""
        return self.t5_name if self.classes is None else self.classes

    def make_head(self) -> nn.Linear:
        """No bias: so guidance commutes with the head and may be applied before it."""
        if self.code_levels:
            return CodeHead(self.dim, self.code_levels)
        return nn.Linear(self.dim, self.num_tokens, bias=False)

    def _add_low_resolution(self, num_tokens: int, seq_len: int) -> None:
        depth = self.cond_depth
        self.cond_encoder = LowResEncoder(
            num_tokens, seq_len, self.dim, depth, *self._block_args, rotary=self.rotary
        )
        self.cond_norm = norm(self.dim)

    def with_low_resolution(self, num_tokens: int, seq_len: int) -> Self:
        """The same transformer, sharing its weights, with an encoder of low-resolution tokens.

        Args:
            num_tokens: codebook size of the low-resolution tokenizer.
            seq_len: M, the number of low-resolution tokens.

        Raises:
            ValueError: it already has one, of another size.
        """
        existing = self.cond_encoder
        if existing is not None:
            if (existing.num_tokens, existing.seq_len) != (num_tokens, seq_len):
                raise ValueError(
                    f"the transformer already reads {existing.seq_len} low-resolution tokens of "
                    f"{existing.num_tokens} codes, not {seq_len} of {num_tokens}: make a new one"
                )
            return self
        made = copy.copy(self)
        made.__dict__.update(_modules=dict(self._modules), _init_args=dict(self._init_args))
        made._init_args |= {"cond_num_tokens": num_tokens, "cond_seq_len": seq_len}
        made._add_low_resolution(num_tokens, seq_len)
        return made.to(self.device)

    @classmethod
    def _upgraded(cls, config: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
        # files before 0.2 do not state the size of the low-resolution encoder
        name = "cond_encoder.embed"
        if f"{name}.token.weight" in state and not config.get("cond_seq_len"):
            sizes = len(state[f"{name}.token.weight"]), len(state[f"{name}.row"]) ** 2
            config = {**config, "cond_num_tokens": sizes[0], "cond_seq_len": sizes[1]}
        # at first, widths were not rounded
        weight = state.get("blocks.0.ff.to_out.weight")
        if weight is not None and weight.ndim == 2 and weight.shape[1] % 8:
            config = {**config, "ff_dim": weight.shape[1]}
        return config

    def _upgrade(self, state: dict[str, Tensor], prefix: str) -> None:
        # before 0.2, one norm served the text and the low-resolution tokens
        if self.cond_norm is not None and f"{prefix}text_norm.weight" in state:
            state.setdefault(f"{prefix}cond_norm.weight", state[f"{prefix}text_norm.weight"])

    def encode_context(self, *branches: Conditioning) -> Context:
        """First phase: everything that does not depend on the image tokens.

        Args:
            *branches: of the guidance, of the same rows and low-resolution tokens. Those without
                a text come last.

        Raises:
            ValueError: embeddings of another width, low-resolution tokens missing or unexpected.
        """
        first = branches[0]
        if (first.cond_ids is None) != (self.cond_encoder is None):
            needs = "needs" if first.cond_ids is None else "takes no"
            raise ValueError(f"this transformer {needs} low-resolution tokens (cond_ids)")
        cond = None
        if self.cond_encoder is not None:
            assert self.cond_norm is not None
            cond = self.cond_norm(self.cond_encoder(first.cond_ids, first.cond_grid))
        return Context.stack([self._encode_branch(branch, cond) for branch in branches])

    def _encode_branch(
        self, conditioning: Conditioning, cond: Float[Tensor, "B M D"] | None
    ) -> Context:
        text, keep = conditioning.text, conditioning.keep
        context = self.text_proj.weight.new_zeros(len(keep), 0, self.dim)
        mask = keep.new_zeros(len(keep), 0)
        if text is not None:
            if text.embeds.shape[-1] != self.text_embed_dim:
                raise ValueError(
                    f"text_embeds have width {text.embeds.shape[-1]}, the transformer reads "
                    f"{self.text_embed_dim} (from {shown(self.text_encoder)} or text_embed_dim)"
                )
            context = self.read(text)
            mask = text.mask & keep[:, None]
        text_start = 1
        if cond is not None:
            context = torch.cat([cond, context], dim=1)
            mask = torch.cat([mask.new_ones(cond.shape[:2]), mask], dim=1)
            text_start += cond.shape[1]
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], dim=1)[None]  # the null key
        keys_values = [
            (k[None], v[None]) for k, v in (block.keys_values(context) for block in self.blocks)
        ]
        made = Context(keys_values, mask, text_start, conditioning.grid)
        if mask.shape[-1] == 1:  # neither text nor low resolution
            return replace(made._map(lambda x: x[:0]), blank=1, whole=True)
        # asked once per call, and not in training, where a GPU would wait for the answer
        return replace(made, whole=not torch.is_grad_enabled() and bool(mask.all()))

    def read(self, text: TextEmbeds) -> Float[Tensor, "B L D"]:
        """The text's states as the blocks' cross-attention sees them."""
        x = self.text_proj(text.embeds.to(self.dtype))
        if self.text_blocks:
            seen = text.mask | ~text.mask.any(1, keepdim=True)  # softmax needs one to see
            for block in self.text_blocks:
                x = block(x, grid=(1, x.shape[1]), mask=seen)
        return self.text_norm(x)

    def forward(
        self,
        ids: Int[Tensor, "B N"],
        context: Context,
        self_cond: Float[Tensor, "G B N D"] | None = None,
        at: Int[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "G B K D"]:
        """Second phase: normalised hidden states of every branch, which `to_logits` reads.

        Args:
            ids: tokens, ``mask_id`` where unknown; the same in all branches.
            context: of G branches; one in training.
            self_cond: hidden states of the previous pass; zeros on the first.
            at: the K positions wanted of each row; all by default. All take part in every layer,
                but the last one's outputs are computed for these alone.
        """
        branches = context.num_branches
        x = self.embed(ids, context.grid)
        if self.self_cond_proj is not None:
            # the product with zeros keeps the weights in every graph (DistributedDataParallel)
            zeros = torch.zeros_like(x)[None]
            x = x + self.self_cond_proj(zeros if self_cond is None else self_cond)
            x = x.flatten(0, 1)
        if self.patches is not None:
            return self._patched(x, context, at).unflatten(0, (branches, -1))
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1
            wanted = at.repeat(len(x) // len(at), 1) if last and at is not None else None
            x = block(x, context, layer, wanted)
        return self.norm(x).unflatten(0, (branches, -1))

    def _patched(
        self, x: Float[Tensor, "r N D"], context: Context, at: Int[Tensor, "B K"] | None
    ) -> Float[Tensor, "R K D"]:
        """All blocks on squares of tokens."""
        assert self.patches is not None
        grid = context.grid or (math.isqrt(x.shape[1]),) * 2
        inner = replace(context, grid=(grid[0] // self.side_step, grid[1] // self.side_step))
        states = self.patches.positions(x, grid)
        for layer, block in enumerate(self.blocks):
            states = block(states, inner, layer)
        out = self.patches.tokens(states, x, grid)
        return self.norm(out if at is None else taken(out, at.repeat(len(out) // len(at), 1)))


class TokenCritic(MaskGitTransformer):
    """A second transformer that tells real tokens from sampled ones (Lezama et al. 2022).

    Same arguments as `MaskGitTransformer`; its ``to_logits`` gives one score (..., N, 1), high
    where a token looks real.
    """

    def make_head(self) -> nn.Linear:
        return nn.Linear(self.dim, 1, bias=False)


class SelfCritic(nn.Module):
    """The critic as a second head on the generating transformer itself.

    Called like a `TokenCritic`: ``critic.to_logits(critic(ids, context))``.
    """

    def __init__(self, transformer: MaskedTransformer):
        super().__init__()
        self._transformer = [transformer]  # in a list: its weights already belong to the MaskGit
        self.to_logits = nn.Linear(transformer.dim, 1, bias=False)

    @property
    def transformer(self) -> MaskedTransformer:
        return self._transformer[0]

    def reading(self, transformer: MaskedTransformer) -> SelfCritic:
        """The same head on another form of the transformer, such as one in another precision."""
        made = copy.copy(self)
        made._transformer = [transformer]
        return made

    def encode_context(self, *branches: Conditioning) -> Context:
        return self.transformer.encode_context(*branches)

    def forward(self, ids: Int[Tensor, "B N"], context: Context) -> Float[Tensor, "G B N D"]:
        return self.transformer(ids, context)
