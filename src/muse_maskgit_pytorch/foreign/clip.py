"""What aMUSEd's and Meissonic's transformers have in common, under diffusers' names.

Tokens come in and logits go out in the same way, in the large models of both through a network of
half the sides. Texts come in twice: as CLIP's states, and as CLIP's pooled embedding, which
together with five micro-conditions (width, height, two crop coordinates, aesthetic score) becomes
one vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..arguments import MAX_TOKENS, MAX_WIDTH, real, whole
from ..layers import taken
from ..structures import Conditioning, TextEmbeds
from ..text import PooledTextEncoder, TextEncoder, pooled_text_encoder
from ..transformer import MaskedTransformer

MICRO_CONDITIONS = 5
Constants = tuple[Tensor, ...]  # what a part computes of the text, before the first step


@dataclass(frozen=True)
class ClipContext:
    """What is constant over the steps, for G branches of B rows.

    Attributes:
        parts: what each part made of texts and micro-conditions, (G, B, ...).
        grid: height and width of the image in tokens.
        shared: what is the same for all rows.
    """

    parts: list[Constants]
    grid: tuple[int, int]
    shared: Constants = ()

    @property
    def num_branches(self) -> int:
        """G"""
        return len(self.parts[0][0])

    def rows(self, rows: slice | Tensor) -> ClipContext:
        return self._map(lambda x: x[:, rows].contiguous())

    def branches(self, count: int) -> ClipContext:
        return self if count == self.num_branches else self._map(lambda x: x[:count])

    def cat(self, other: ClipContext) -> ClipContext:
        most = max(self.num_branches, other.num_branches)
        parts = []
        for pair in zip(self.parts, other.parts, strict=True):
            both = [[torch.cat([x, *[x[:1]] * (most - len(x))]) for x in part] for part in pair]
            parts.append(tuple(torch.cat(each, dim=1) for each in zip(*both, strict=True)))
        return replace(self, parts=parts)

    def _map(self, function: Callable[[Tensor], Tensor]) -> ClipContext:
        return replace(self, parts=[tuple(map(function, part)) for part in self.parts])


def modulated(x: Float[Tensor, "R N D"], scale_shift: Tensor) -> Float[Tensor, "R N D"]:
    """Scaled and shifted by the two halves of a vector."""
    scale, shift = scale_shift.chunk(2, dim=-1)
    return x * (1 + scale) + shift


def embedded(numbers: Float[Tensor, " m"], width: int) -> Float[Tensor, "m w"]:
    """Numbers as cosines and sines of falling frequencies."""
    half = width // 2
    powers = torch.arange(half, dtype=torch.float32, device=numbers.device) / half
    angles = numbers[:, None] * torch.exp(-math.log(10_000) * powers)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def as_map(x: Float[Tensor, "R N C"], grid: tuple[int, int]) -> Float[Tensor, "R C h w"]:
    return x.transpose(1, 2).unflatten(2, grid)


class Vector(nn.ModuleDict):
    """Two linear layers with SiLU between them, which make a vector of the width of the network."""

    def __init__(self, width: int, dim: int, bias: bool = True):
        super().__init__(
            {
                "linear_1": nn.Linear(width, dim, bias=bias),
                "linear_2": nn.Linear(dim, dim, bias=bias),
            }
        )

    def forward(self, x: Float[Tensor, "R W"]) -> Float[Tensor, "R D"]:
        return self["linear_2"](F.silu(self["linear_1"](x)))


class Resampling(nn.Module):
    """A norm, then a 2 x 2 convolution that halves the sides, or a transposed one that doubles."""

    def __init__(self, dim: int, up: bool, bias: bool, affine: bool, eps: float):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps, affine)
        conv = nn.ConvTranspose2d if up else nn.Conv2d
        self.conv = conv(dim, dim, 2, stride=2, bias=bias)

    def forward(self, x: Float[Tensor, "R N C"], grid: tuple[int, int]) -> Float[Tensor, "R M C"]:
        return self.conv(as_map(self.norm(x), grid)).flatten(2).transpose(1, 2)


class ClipTransformer(MaskedTransformer):
    """The frame of both: a subclass says what becomes of the text (`_text`), what of that and of
    the vector is constant over the steps (`_constants`), and what is computed of the tokens
    (`_between`). `read_pipeline` makes them from a folder in diffusers' layout.

    Texts are CLIP's states before its last layer and its projected pooled embedding, joined to one
    tensor, the pooled one first (`PooledTextEncoder`). All positions are seen, padding too, as in
    their training. Where there is no text, the empty prompt's states stand, which are among the
    weights (``no_text``).

    Args:
        num_tokens: codebook size V.
        seq_len: N of the trained square; other sizes are drawn as well, since no table of positions
            is learned.
        mask_id: what stands for "unknown".
        num_embeddings: ids that can be read: V, the mask, and what rounds that up.
        dim: width of the transformer.
        channels: width of what is around it, at the sides of the tokens.
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

    partial = True

    def __init__(
        self,
        *,
        num_tokens: int,
        seq_len: int,
        mask_id: int,
        num_embeddings: int,
        dim: int,
        channels: int,
        embed_dim: int,
        resample: bool,
        text_embed_dim: int,
        pooled_dim: int,
        micro_dim: int,
        text_encoder: str,
        max_text_len: int,
        factor: int,
        bias: bool,
        affine: bool,
        eps: float,
        crop: Sequence[int],
        aesthetic_score: float,
    ):
        super().__init__()
        widths = dict(dim=dim, channels=channels, embed_dim=embed_dim, micro_dim=micro_dim)
        widths |= dict(text_embed_dim=text_embed_dim, pooled_dim=pooled_dim, factor=factor)
        counts = dict(num_tokens=num_tokens, seq_len=seq_len, max_text_len=max_text_len)
        counts |= dict(num_embeddings=num_embeddings)
        check_sizes(MAX_WIDTH, **widths)
        check_sizes(MAX_TOKENS, **counts)
        check_divisible("micro_dim", micro_dim, 2)
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

        self.encoder_proj_layer_norm = nn.RMSNorm(dim, eps, affine)
        self.embed = nn.ModuleDict(
            {
                "embeddings": nn.Embedding(num_embeddings, embed_dim),
                "layer_norm": nn.RMSNorm(embed_dim, eps, affine),
                "conv": nn.Linear(embed_dim, channels, bias=bias),
            }
        )
        self.cond_embed = Vector(MICRO_CONDITIONS * micro_dim + pooled_dim, dim, bias)

        def half(name: str, up: bool) -> nn.ModuleDict:
            made = {name: Resampling(channels, up, bias, affine, eps)} if resample else {}
            return nn.ModuleDict(made)

        self.down_block, self.up_block = half("downsample", up=False), half("upsample", up=True)
        self.project_to_hidden_norm = nn.RMSNorm(channels, eps, affine)
        self.project_to_hidden = nn.Linear(channels, dim, bias=bias)
        self.project_from_hidden_norm = nn.RMSNorm(dim, eps, affine)
        self.project_from_hidden = nn.Linear(dim, channels, bias=bias)
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

    def text_encoder_changed(self, encoder: TextEncoder) -> None:
        """The empty prompt has other states now, too, as in diffusers' pipelines."""
        self.set_no_text(encoder.encode(""))

    def encode_context(self, *branches: Conditioning) -> ClipContext:
        """First phase: what becomes of texts and micro-conditions.

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
        text = self.encoder_proj_layer_norm(self._text(states))
        micro = [grid[1] * self.factor, grid[0] * self.factor, *self.crop, self.aesthetic_score]
        numbers = torch.tensor(micro, dtype=torch.float32, device=texts.device)
        micro = embedded(numbers, self.micro_dim).flatten().to(pooled).expand(len(pooled), -1)
        made = self._constants(text, self.cond_embed(torch.cat([pooled, micro], dim=1)))
        shape = (len(branches), -1)
        return ClipContext([tuple(x.unflatten(0, shape) for x in part) for part in made], grid)

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

    def forward(
        self,
        ids: Int[Tensor, "B N"],
        context: ClipContext,
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
        x = self.embed["conv"](self.embed["layer_norm"](self.embed["embeddings"](ids)))
        if self.side_step > 1:
            x = self.down_block["downsample"](x, grid)
        parts = [tuple(x.flatten(0, 1) for x in part) for part in context.parts]
        x = self._between(x.repeat(branches, 1, 1), inner, parts, context.shared)
        if self.side_step > 1:
            x = self.up_block["upsample"](x, inner)
        x = x if at is None else taken(x, at.repeat(branches, 1))
        x = self.mlm_layer["layer_norm"](self.mlm_layer["conv1"](x))
        return x.unflatten(0, (branches, -1))

    def to_logits(self, hidden: Float[Tensor, "*s D"]) -> Float[Tensor, "*s V"]:
        """Logits of the codes; a linear layer."""
        return self.mlm_layer["conv2"](hidden)

    def _text(self, states: Float[Tensor, "R L E"]) -> Float[Tensor, "R L D"]:
        """CLIP's states in the width of the transformer."""
        raise NotImplementedError

    def _constants(
        self, text: Float[Tensor, "R L D"], cond: Float[Tensor, "R D"]
    ) -> list[Constants]:
        """What is computed once of texts and vectors: of each part, tensors of R rows."""
        raise NotImplementedError

    def _between(
        self,
        x: Float[Tensor, "R n C"],
        grid: tuple[int, int],
        parts: list[Constants],
        shared: Constants,
    ) -> Float[Tensor, "R n C"]:
        """The network proper, of all branches' rows.

        Args:
            x: states of the tokens, of n = h * w positions.
            grid: (h, w), in tokens or in squares of two by two.
            parts: what `_constants` gave.
            shared: the context's.
        """
        raise NotImplementedError


def check_sizes(most: int, **sizes: int) -> None:
    """Refuse sizes outside [1, ``most``]."""
    for name, size in sizes.items():
        whole(name, size, 1, most)


def check_divisible(name: str, width: int, divisor: int) -> None:
    if width % divisor:
        raise ValueError(f"{name} {width} is not divisible by {divisor}")
