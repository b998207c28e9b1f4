"""The nouns: small frozen dataclasses that carry data between the parts.

Read first. One letter means one thing everywhere: B batch, N image tokens (N = h*w), L text tokens,
M low-resolution tokens, D model width, E text width, V codebook size, H W pixels, h w token grid.
A plain tensor is used where one tensor is enough:

- images: float (B, 3, H, W), RGB in [0, 1] at every boundary;
- token ids: int64 (B, N), values in [0, V); ``mask_id`` = V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Schedule = Literal["cosine", "arccos", "linear", "square", "cosine32", "linear32"]


@dataclass(frozen=True)
class QuantizerOutput:
    """What a quantizer makes of a feature map.

    Attributes:
        quantized: the codes, projected back to the width of the feature map.
        ids: index of each code in the codebook.
        loss: auxiliary loss, the weighted sum of ``terms``; zero where the quantizer has none.
        terms: its parts by name, unweighted: "commitment", "entropy" (of a vector's code, in
            nats), "diversity" (entropy of the codes over the batch, in nats).
        usage: share of the codebook's entries that occur in this batch, in [0, 1].
    """

    quantized: Float[Tensor, "B C h w"]
    ids: Int[Tensor, "B h w"]
    loss: Float[Tensor, ""]
    terms: dict[str, Tensor]
    usage: Float[Tensor, ""]


@dataclass(frozen=True)
class TextEmbeds:
    """Hidden states of a text encoder and which of them are real tokens.

    The mask is carried along, never inferred from embeddings that happen to be zero.
    """

    embeds: Float[Tensor, "B L E"]
    mask: Bool[Tensor, "B L"]

    def __post_init__(self):
        if self.embeds.shape[:2] != self.mask.shape:
            raise ValueError(
                f"TextEmbeds: embeds {tuple(self.embeds.shape)} and mask {tuple(self.mask.shape)} "
                "must agree in batch and length"
            )

    @classmethod
    def padded(cls, rows: Sequence[Tensor]) -> TextEmbeds:
        """Join texts (L,E) of different lengths, each of real tokens alone."""
        lengths = torch.tensor([len(row) for row in rows], device="cpu")
        mask = torch.arange(int(lengths.max()), device="cpu") < lengths[:, None]
        return cls(torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask)

    @classmethod
    def of(cls, value: TextEmbeds | Tensor) -> TextEmbeds:
        """Accept a bare (B, L, E) tensor, all of whose positions are then real tokens."""
        if isinstance(value, TextEmbeds):
            return value
        return cls(value, torch.ones(value.shape[:2], dtype=torch.bool, device=value.device))

    def to(self, device: torch.device | str) -> TextEmbeds:
        return TextEmbeds(self.embeds.to(device), self.mask.to(device))

    def cat(self, other: TextEmbeds) -> TextEmbeds:
        """Stack two batches of texts, padding the shorter one."""
        length = max(self.mask.shape[1], other.mask.shape[1])

        def padded(text: TextEmbeds) -> TextEmbeds:
            extra = length - text.mask.shape[1]
            pad = torch.nn.functional.pad
            return TextEmbeds(pad(text.embeds, (0, 0, 0, extra)), pad(text.mask, (0, extra)))

        a, b = padded(self), padded(other)
        return TextEmbeds(torch.cat([a.embeds, b.embeds]), torch.cat([a.mask, b.mask]))


@dataclass(frozen=True)
class Conditioning:
    """Everything a masked transformer is conditioned on.

    Attributes:
        text: the captions; None for no text at all, which only generation has.
        cond_ids: low-resolution token ids (super-resolution), or None.
        keep: rows whose text is seen; False removes the text (classifier-free guidance).
        grid: height and width of the image in tokens; if None, the trained square.
        cond_grid: the same of the low-resolution image.
    """

    text: TextEmbeds | None
    cond_ids: Int[Tensor, "B M"] | None
    keep: Bool[Tensor, " B"]
    grid: tuple[int, int] | None = None
    cond_grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class MaskedTokens:
    """One draw of the training corruption: what goes in, and what must come out where."""

    input_ids: Int[Tensor, "B N"]
    labels: Int[Tensor, "B N"]
    mask: Bool[Tensor, "B N"]


@dataclass(frozen=True)
class LossTerms:
    """Named terms of the training loss, each a scalar; ``critic`` is None without a critic.

    ``ce`` is that of the masked tokens, ``total`` the weighted sum.
    """

    total: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    critic: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class Batch:
    """One batch of training data: images and texts, or the ids and embeddings cached from them.

    Attributes:
        image_size: height and width of the images; if None, the trained square.
        loss_mask: what their pixels count in the loss, in [0, 1], or with ``ids`` their tokens
            (H and W are then the grid's); None: all alike.
    """

    images: Float[Tensor, "B 3 H W"] | None = None
    cond_images: Float[Tensor, "B 3 Hc Wc"] | None = None
    texts: list[str] | None = None
    ids: Int[Tensor, "B N"] | None = None
    cond_ids: Int[Tensor, "B M"] | None = None
    text_embeds: TextEmbeds | None = None
    image_size: tuple[int, int] | None = None
    loss_mask: Float[Tensor, "B 1 H W"] | None = None


@dataclass(frozen=True)
class SampleStep:
    """What a callback sees after each sampling step.

    Attributes:
        step: how many steps are done, 1-based.
        ids: tokens with ``mask_id`` where still masked.
        mask: True where still masked.
        scores: what the policy ranked the positions by, highest kept: its score plus noise, inf
            where there was nothing to choose, -inf where a decided token was masked again.
        log_probs: log-probability, at temperature 1, of each token when it was drawn; where still
            masked, that of the rejected draw; 0 for tokens given by the canvas.
    """

    step: int
    ids: Int[Tensor, "B N"]
    mask: Bool[Tensor, "B N"]
    scores: Float[Tensor, "B N"]
    log_probs: Float[Tensor, "B N"]
