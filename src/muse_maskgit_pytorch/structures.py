"""The nouns: small frozen dataclasses that carry data between the parts.

Read first. One letter means one thing everywhere: B batch, N image tokens (N = h*w), L text tokens,
M low-resolution tokens, D model width, E text width, V codebook size, H W pixels, h w token grid.
A plain tensor is used where one tensor is enough:

- images: float (B, 3, H, W), RGB in [0, 1] at every boundary;
- token ids: int64 (B, N), values in [0, V); ``mask_id`` = V.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Schedule = Literal["cosine", "arccos", "linear", "square"]
GuidanceSchedule = Literal["linear", "constant", "cosine", "interval"]
Policy = Literal["confidence", "margin", "entropy", "halton", "random", "critic"]


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
        text: the captions.
        cond_ids: low-resolution token ids (super-resolution), or None.
        keep: rows whose text is seen; False removes the text (classifier-free guidance).
        grid: height and width of the image in tokens; None: the trained square.
        cond_grid: those of the low-resolution image.
    """

    text: TextEmbeds
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
    """Named terms of the training loss, each a scalar; ``critic`` is None without a critic."""

    total: Float[Tensor, ""]
    ce: Float[Tensor, ""]
    critic: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class Batch:
    """One batch of training data: images and texts, or the ids and embeddings cached from them."""

    images: Float[Tensor, "B 3 H W"] | None = None
    texts: list[str] | None = None
    ids: Int[Tensor, "B N"] | None = None
    cond_images: Float[Tensor, "B 3 Hc Wc"] | None = None
    cond_ids: Int[Tensor, "B M"] | None = None
    text_embeds: TextEmbeds | None = None


FINITE = (-sys.float_info.max, sys.float_info.max)
SHARE = (0, 1)
RANGES = {
    "timesteps": (1, math.inf),
    "temperature": (0, math.inf),
    "choice_temperature": (0, math.inf),
    "cond_scale": FINITE,
    "guidance_start": SHARE,
    "guidance_end": SHARE,
    "lowres_scale": FINITE,
    "remask": SHARE,
    "temperature_end": (0, math.inf),
    "top_k": (0, math.inf),
    "top_p": SHARE,
    "min_p": SHARE,
}


def _one_of(name: str, value: object, kind: object, more: str = "") -> None:
    if value not in get_args(kind):
        raise ValueError(f"{name} must be one of {get_args(kind)}{more}, not {value!r}")


def _named_or_table(name: str, value: object, kind: object, bounds: tuple[float, float]) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return _one_of(name, value, kind, " or a table of numbers")
    if not value:
        raise ValueError(f"{name} is an empty table: give one number for each step")
    return _in_range(name, value, *bounds)


def _in_range(name: str, value: object, low: float, high: float) -> None:
    for number in value if isinstance(value, Sequence) else [value]:
        if not low <= number <= high:  # also refuses NaN
            wanted = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            wanted = "finite" if (low, high) == FINITE else wanted
            raise ValueError(f"{name} must be {wanted}, not {number}")


@dataclass(frozen=True)
class SampleOptions:
    """How to sample. Each number may also be a sequence with one value per row (image).

    Where a step takes place is its progress, i / (steps - 1): 0 at the first, 1 at the last.

    Attributes:
        timesteps: steps from all masked to none (paper 2.8: 24 base, 8 super-resolution).
        temperature: of the token choice, >= 0; 0 takes the likeliest token.
        choice_temperature: scale of the Gumbel noise on the log-confidence that orders the
            positions; falls linearly to 0 over the steps (MaskGIT; not in the Muse paper).
        cond_scale: guidance ``u + cond_scale * (c - u)``; 1 is no guidance. The paper writes
            ``(1+t) c - t u``, so cond_scale = 1 + t (2.7).
        guidance_schedule: the share of t at each step: "linear" raises it from 0 to 1 (the
            paper's), "cosine" does so as (1 - cos(pi * progress)) / 2 (MDT, Gao et al. 2023),
            "constant" is 1 throughout, "interval" 1 from guidance_start to guidance_end and 0
            elsewhere (Kynkaanniemi et al. 2024). Or a table: one share per step, any numbers,
            read at the progress, linear between its entries.
        guidance_start: progress in [0, 1] at which the interval begins.
        guidance_end: progress in [0, 1] at which it ends.
        lowres_scale: guidance by the low-resolution image of a super-resolution stage, with its
            own scale: ``z + lowres_scale * (u - z) + cond_scale * (c - u)``, where c sees text
            and low resolution, u no text (or the negative one) and z neither (InstructPix2Pix,
            Brooks et al. 2023, eq. 3). 1 is none; else each guided step costs a third pass.
        noise_schedule: share of tokens still masked as a function of the steps done. Or a table:
            the falling shares in [0, 1] after each step but the last, linear between its entries.
        policy: which positions to keep. "confidence": those whose drawn token is likeliest
            (MaskGIT); "margin": where the two likeliest tokens are furthest apart; "entropy":
            where the distribution has the least; "halton": evenly spread (Besnier et al. 2025);
            "random"; "critic": what the model's token critic holds real. None: the critic of a
            model that has one, else confidence.
        remask: strength in [0, 1] with which decided tokens are masked again, the least likely
            ones the likeliest, while as many more are decided (ReMDM, Wang et al. 2025).
        temperature_end: temperature at the last step, reached linearly; None: as in the first.
        top_k: draw from the k likeliest tokens only; 0: from all.
        top_p: only from the fewest tokens that together have probability p; 1: from all.
        min_p: only from tokens with this multiple of the likeliest one's probability.
        seeds: one integer per row, or s for s, s + 1, ... None draws them from torch's global
            generator. Their lowest 32 bits count: torch's CPU generator reads no more.
    """

    timesteps: int | Sequence[int] = 24
    temperature: float | Sequence[float] = 1.0
    choice_temperature: float | Sequence[float] = 4.5
    cond_scale: float | Sequence[float] = 3.0
    guidance_schedule: GuidanceSchedule | Sequence[float] = "linear"
    guidance_start: float | Sequence[float] = 1 / 3
    guidance_end: float | Sequence[float] = 1.0
    lowres_scale: float | Sequence[float] = 1.0
    noise_schedule: Schedule | Sequence[float] = "cosine"
    policy: Policy | None = None
    remask: float | Sequence[float] = 0.0
    temperature_end: float | Sequence[float] | None = None
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    seeds: int | Sequence[int] | None = None

    def __post_init__(self):
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), torch.Tensor):
                object.__setattr__(self, field.name, value.tolist())
        if self.policy is not None:
            _one_of("policy", self.policy, Policy)
        _named_or_table("guidance_schedule", self.guidance_schedule, GuidanceSchedule, FINITE)
        _named_or_table("noise_schedule", ratios := self.noise_schedule, Schedule, SHARE)
        if not isinstance(ratios, str) and list(ratios) != sorted(ratios, reverse=True):
            raise ValueError(f"noise_schedule must fall from step to step, not {ratios}")
        for name in ("timesteps", "top_k"):
            value = getattr(self, name)
            numbers = value if isinstance(value, Sequence) else [value]
            if not all(isinstance(number, int) for number in numbers):
                raise ValueError(f"{name} must be whole numbers, not {value}")
        for name, (low, high) in RANGES.items():
            if getattr(self, name) is not None:
                _in_range(name, getattr(self, name), low, high)

    def replace(self, **changes) -> SampleOptions:
        return replace(self, **changes)


@dataclass(frozen=True)
class SampleStep:
    """What a callback sees after each sampling step.

    Attributes:
        step: how many steps are done, 1-based.
        ids: tokens with ``mask_id`` where still masked.
        mask: True where still masked.
        scores: what the policy ordered the positions by, the highest kept: its score with its
            noise, inf where no choice was left, -inf where a decided token was masked again.
        log_probs: log-probability, at temperature 1, of each token when it was drawn; that of the
            draw not kept where still masked, 0 for tokens of the canvas.
    """

    step: int
    ids: Int[Tensor, "B N"]
    mask: Bool[Tensor, "B N"]
    scores: Float[Tensor, "B N"]
    log_probs: Float[Tensor, "B N"]
