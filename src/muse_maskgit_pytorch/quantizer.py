"""VQ, SimVQ, LFQ and FSQ behind one interface: feature map -> codes, ids -> codes.

The quantizers themselves are vector-quantize-pytorch's; here they get one interface, float32
arithmetic under mixed precision, and codebook sizes that mean what they say.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .structures import QuantizerOutput

QuantizerName = Literal["vq", "simvq", "lfq", "fsq"]
FSQ_LEVELS = (8, 7, 6, 5, 4, 3)


def fsq_levels(codebook_size: int) -> list[int]:
    """Levels whose product is ``codebook_size``: the fewest, then the most even, of 3 to 8.

    Few coarse dimensions train better than many binary ones (FSQ, Mentzer et al. 2023, table 1).

    Raises:
        ValueError: no such product; the nearest sizes that have one are named.
    """
    found = _factorise(codebook_size)
    if found is None:
        near = [
            next((n for n in numbers if _factorise(n)), None)
            for numbers in (
                range(codebook_size, 2, -1),
                range(codebook_size, 2 * codebook_size + 9),
            )
        ]
        raise ValueError(
            f"codebook_size {codebook_size} is no product of FSQ levels 3 to 8; "
            f"the nearest that are: {[n for n in near if n]}"
        )
    return found


def _factorise(size: int, largest: int = 8) -> list[int] | None:
    if size == 1:
        return []
    options = [
        [level, *rest]
        for level in FSQ_LEVELS
        if level <= largest and size % level == 0
        for rest in [_factorise(size // level, level)]
        if rest is not None
    ]
    return min(options, key=lambda levels: (len(levels), max(levels) - min(levels)), default=None)


class Quantizer(nn.Module):
    """Maps a feature map to codes of a codebook and back.

    Args:
        dim: channels of the feature map.
        codebook_size: number of codes V.
        kind: "vq" (nearest neighbour, EMA codes, cosine distance, dead codes revived), "simvq"
            (a frozen codebook behind one learned linear map), "lfq" (signs; V a power of two)
            or "fsq" (rounding; V a product of small levels).
        codebook_dim: width of a code for "vq" and "simvq"; low-dimensional codes keep the whole
            codebook in use (ViT-VQGAN, 3.2). LFQ and FSQ derive it from V.
        levels: FSQ's levels; derived from V unless given.
        commitment_weight: weight of the commitment term ("vq", "simvq", "lfq").
        entropy_weight: weight of LFQ's entropy terms.
        diversity_gamma: weight of the codebook's entropy within LFQ's entropy terms.
        decay: EMA decay of "vq" codes.

    Raises:
        ValueError: a codebook size that the quantizer cannot have.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        kind: QuantizerName = "vq",
        codebook_dim: int = 16,
        levels: list[int] | None = None,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        diversity_gamma: float = 1.0,
        decay: float = 0.99,
    ):
        super().__init__()
        from vector_quantize_pytorch import FSQ, LFQ, SimVQ, VectorQuantize

        if codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, not {codebook_size}")
        if levels is not None and kind != "fsq":
            raise ValueError(f"fsq_levels are given, but the quantizer is {kind!r}: leave them out")
        self.kind = kind
        self.codebook_size = codebook_size
        if kind == "vq":
            width = codebook_dim
            self.inner: Any = VectorQuantize(
                dim=width,
                codebook_size=codebook_size,
                use_cosine_sim=True,
                decay=decay,
                threshold_ema_dead_code=2,
                commitment_weight=commitment_weight,
            )
        elif kind == "simvq":
            width = codebook_dim
            self.inner = SimVQ(
                dim=width,
                codebook_size=codebook_size,
                input_to_quantize_commit_loss_weight=commitment_weight,
            )
        elif kind == "lfq":
            if codebook_size & (codebook_size - 1):
                raise ValueError(
                    f"codebook_size {codebook_size} is no power of two, which LFQ needs; "
                    f"the next one is {1 << codebook_size.bit_length()}"
                )
            width = codebook_size.bit_length() - 1
            self.inner = LFQ(
                dim=width,
                codebook_size=codebook_size,
                entropy_loss_weight=entropy_weight,
                diversity_gamma=diversity_gamma,
                commitment_loss_weight=commitment_weight,
            )
        elif kind == "fsq":
            levels = fsq_levels(codebook_size) if levels is None else list(levels)
            if math.prod(levels) != codebook_size:
                raise ValueError(
                    f"fsq_levels {levels} give {math.prod(levels)} codes, "
                    f"codebook_size says {codebook_size}: leave one of them out"
                )
            width = len(levels)
            self.inner = FSQ(levels=levels, dim=width)
        else:
            raise ValueError(f"quantizer {kind!r} is unknown: use vq, simvq, lfq or fsq")
        self.project_in = nn.Conv2d(dim, width, 1)
        self.project_out = nn.Conv2d(width, dim, 1)

    def forward(self, features: Float[Tensor, "B C h w"]) -> QuantizerOutput:
        # distances and rounding decide between neighbouring codes: too fine for half precision
        with torch.autocast(features.device.type, enabled=False):
            z = self.project_in(features.float())
            rows = z.permute(0, 2, 3, 1).flatten(1, 2)  # b c h w -> b (h w) c
            codes, ids, *rest = self.inner(rows)
            codes = codes.transpose(1, 2).reshape(z.shape)
            quantized = self.project_out(codes)
        loss = rest[0].sum() if rest else z.new_zeros(())
        ids = ids.long().view(ids.shape[0], *z.shape[-2:])
        counts = torch.zeros(self.codebook_size, device=ids.device)
        counts.scatter_(0, ids.flatten(), 1.0)
        return QuantizerOutput(quantized.to(features.dtype), ids, loss, counts.mean())

    def decode(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """The quantized feature map that ``forward`` gave together with these ids."""
        flat = ids.flatten(1)
        if self.kind == "vq":
            codes = self.inner.get_codes_from_indices(flat)
        else:
            codes = self.inner.indices_to_codes(flat)
        codes = codes.float().transpose(1, 2).reshape(ids.shape[0], -1, *ids.shape[1:])
        return self.project_out(codes)
