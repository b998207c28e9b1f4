"""VQ, SimVQ, LFQ, BSQ and FSQ behind one interface: feature map -> codes, ids -> codes.

Every quantizer takes rows of vectors (B, n, c) and gives codes, ids and named loss terms, in
float32 whatever the precision around it, and alike on one process and on many: whatever a
codebook learns from a batch it learns from the batches of all processes. SimVQ is
vector-quantize-pytorch's. VQ is ours because a codebook with its dead codes revived must stay
equal on all processes, LFQ and BSQ because their entropy must not cost a table of all codes, and
FSQ because nothing of it needs such a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .arguments import MAX_WIDTH, whole
from .distributed import gather_rows, mean_over_processes, sum_over_processes
from .structures import QuantizerOutput

QuantizerName = Literal["vq", "simvq", "lfq", "bsq", "fsq"]
FSQ_LEVELS = (8, 7, 6, 5, 4, 3)
MAX_CODES = 2**24


class Codes(NamedTuple):
    """What a quantizer makes of rows of vectors."""

    codes: Float[Tensor, "B n c"]
    ids: Int[Tensor, "B n"]
    terms: dict[str, Tensor]


class VQ(nn.Module):
    """Nearest neighbour in a codebook of moving averages (VQ-VAE, van den Oord et al. 2017, A.1).

    A code that is chosen less than ``DEAD`` times as often as the average one is dead. Dead codes
    are moved to vectors of the batch, spread in proportion to their distance from their nearest
    code, so that they go where the codebook is too coarse; a new codebook is filled in this way
    from the first batches. It is done without random numbers, from the batches of all processes.

    Args:
        dim: width of a code.
        codebook_size: number of codes.
        decay: of the moving averages, per batch (`one_batch`).
        l2_norm: codes and vectors on the unit sphere (ViT-VQGAN, Yu et al. 2021, 3.2).
    """

    DEAD = 0.1

    codes: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, dim: int, codebook_size: int, decay: float, l2_norm: bool):
        super().__init__()
        self.decay, self.l2_norm = decay, l2_norm
        self._collected: list[tuple[Tensor, Tensor]] | None = None  # within `one_batch`
        self.register_buffer("codes", F.normalize(torch.randn(codebook_size, dim), dim=-1))
        self.register_buffer("sums", torch.zeros(codebook_size, dim))
        self.register_buffer("counts", torch.zeros(codebook_size))

    def forward(self, rows: Float[Tensor, "B n c"]) -> Codes:
        if self.l2_norm:
            rows = F.normalize(rows, dim=-1)
        flat = rows.detach().flatten(0, 1)
        # |z - c|^2 without |z|^2, which is the same for all codes
        distances = torch.addmm(self.codes.square().sum(-1), flat, self.codes.t(), alpha=-2)
        least, ids = distances.min(dim=-1)
        codes = self.codes[ids].view_as(rows)
        if self.training and torch.is_grad_enabled():  # encode_to_ids only looks
            self._see(flat, ids, (least + flat.square().sum(-1)).clamp(min=0))
        ids = ids.view(rows.shape[:2])
        return Codes(rows + (codes - rows).detach(), ids, {"commitment": F.mse_loss(rows, codes)})

    def codes_of(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B n c"]:
        return self.codes[ids]

    @contextmanager
    def one_batch(self) -> Iterator[None]:
        """Take the training forwards within the block as one batch: the codes move at its end.

        All processes must run the same number of forwards. An exception leaves the codes alone.
        """
        self._collected = seen = []
        try:
            yield
            if seen:
                self._learn(seen)
        finally:
            self._collected = None

    @torch.no_grad()
    def _see(self, rows: Tensor, ids: Tensor, distances: Tensor) -> None:
        """Learn from these vectors now, or within `one_batch` keep them for its end."""
        finite = rows.isfinite().all(dim=-1)  # one bad batch must not poison the codebook
        rows, ids, distances = rows[finite], ids[finite], distances[finite]
        sums = torch.zeros(len(self.codes), rows.shape[1] + 1, device=rows.device)
        sums.index_add_(0, ids, F.pad(rows, (0, 1), value=1.0))
        candidates = torch.cat([rows, distances[:, None]], dim=1)
        if self._collected is None:
            self._learn([(sums, candidates)])
        else:
            self._collected.append((sums, candidates))

    @torch.no_grad()
    def _learn(self, seen: list[tuple[Tensor, Tensor]]) -> None:
        """Move the codes towards the vectors, then revive the dead ones.

        Args:
            seen: for each forward the sums and counts of the vectors by code (V, c + 1), and the
                vectors with their squared distances (n, c + 1).
        """
        batch = sum_over_processes(torch.stack([sums for sums, _ in seen]).sum(0))
        self.sums.lerp_(batch[:, :-1], 1 - self.decay)
        self.counts.lerp_(batch[:, -1], 1 - self.decay)
        average = batch[:, -1].sum() / len(self.codes)
        means = self.sums / self.counts.clamp(min=1e-12)[:, None]
        if self.l2_norm:
            means = F.normalize(means, dim=-1)
        self.codes.copy_(torch.where(self.counts[:, None] > 0, means, self.codes))

        dead = (self.counts < self.DEAD * average).nonzero()[:, 0]
        if len(dead) == 0:  # equal on all processes, so they all go on or all return
            return
        # forward by forward: the order of one process that sees the same batches
        candidates = torch.cat([gather_rows(rows) for _, rows in seen])
        total = candidates[:, -1].double().cumsum(0)
        dead = dead[: len(candidates)]
        if len(dead) == 0 or total[-1] <= 0:
            return
        places = (torch.arange(len(dead), device=dead.device) + 0.5) / len(dead) * total[-1]
        chosen = candidates[torch.searchsorted(total, places).clamp(max=len(total) - 1), :-1]
        self.codes[dead] = chosen
        self.sums[dead] = chosen * average
        self.counts[dead] = average


class Binary(nn.Module):
    """One bit per dimension: LFQ (Yu et al. 2023), or on the unit sphere BSQ (Zhao et al. 2024).

    The entropy terms see each vector as a random code, whose bits are independent with log-odds
    proportional to the vector. The entropy of one vector's code is then exactly the sum of its
    bits'. The entropy of the codes over the batch is taken within groups of ``GROUP`` bits and
    summed, an upper bound (BSQ, 4.2): exact up to 1,024 codes, and affordable at 2^18.

    Args:
        bits: width of a code; the codebook has 2^bits.
        spherical: vectors and codes on the unit sphere (BSQ).
    """

    GROUP = 10
    SHARPNESS = 4.0  # log-odds of a bit at the distance of the code from the decision boundary

    powers: Tensor

    def __init__(self, bits: int, spherical: bool):
        super().__init__()
        self.spherical = spherical
        self.scale = bits**-0.5 if spherical else 1.0
        self.register_buffer("powers", 2 ** torch.arange(bits), persistent=False)

    def forward(self, rows: Float[Tensor, "B n c"]) -> Codes:
        if self.spherical:
            rows = F.normalize(rows, dim=-1)
        ids = ((rows > 0) * self.powers).sum(-1)
        codes = self.codes_of(ids)
        terms = {"commitment": F.mse_loss(rows, codes)}
        if self.training and torch.is_grad_enabled():
            terms |= self._entropies(rows.flatten(0, 1))
        return Codes(rows + (codes - rows).detach(), ids, terms)

    def codes_of(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B n c"]:
        return ((ids[..., None] & self.powers) != 0).float() * (2 * self.scale) - self.scale

    def _entropies(self, rows: Float[Tensor, "n c"]) -> dict[str, Tensor]:
        odds = rows * (self.SHARPNESS / self.scale)
        chances = torch.stack([torch.sigmoid(-odds), torch.sigmoid(odds)], dim=-1)  # n c 2
        diversity = rows.new_zeros(())
        for bits in chances.split(self.GROUP, dim=1):
            joint = bits[:, 0]
            for bit in bits.unbind(1)[1:]:
                joint = (joint[:, :, None] * bit[:, None]).flatten(1)
            diversity = diversity + _entropy(mean_over_processes(joint))
        return {"entropy": _entropy(chances).sum(-1).mean(), "diversity": diversity}


def _entropy(chances: Tensor) -> Tensor:
    """Entropy in nats over the last dimension."""
    return -torch.special.xlogy(chances, chances.clamp(min=1e-12)).sum(-1)


class FSQ(nn.Module):
    """Rounding to a few levels in each dimension (Mentzer et al. 2023, appendix A.1).

    A vector is bounded to the range of its levels by tanh, so shifted where their number is even
    that zero lies between two of them, and rounded; a code is in [-1, 1].

    Args:
        levels: of each dimension.
    """

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: list[int]):
        super().__init__()
        sizes = torch.tensor(levels, dtype=torch.int32)
        self.register_buffer("levels", sizes, persistent=False)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("basis", torch.tensor(basis, dtype=torch.int32), persistent=False)

    def forward(self, rows: Float[Tensor, "B n c"]) -> Codes:
        half = (self.levels - 1) * 1.001 / 2  # a little more, or the outermost would be rare
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(rows + torch.atanh(offset / half)) * half - offset
        codes = (bounded + (bounded.round() - bounded).detach()) / (self.levels // 2)
        places = codes * (self.levels // 2) + self.levels // 2
        ids = (places * self.basis).sum(-1).round().to(torch.int32)
        return Codes(codes, ids, {})

    def codes_of(self, ids: Int[Tensor, "B n"]) -> Float[Tensor, "B n c"]:
        places = ids[..., None] // self.basis % self.levels
        return (places - self.levels // 2) / (self.levels // 2)


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
            f"codebook_size {codebook_size} is not a product of FSQ levels 3 to 8; "
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
        kind: "vq" (nearest neighbour, codes are moving averages, dead ones revived), "simvq" (a
            frozen codebook behind one learned linear map), "lfq" and "bsq" (signs, "bsq" on the
            unit sphere; V a power of two) or "fsq" (rounding; V a product of small levels).
        codebook_dim: width of a code, by default 16 for "vq" and 6 for "simvq"; low-dimensional
            codes keep the whole codebook in use (ViT-VQGAN, 3.2). The others derive it from V.
        l2_norm: codes and vectors of "vq" on the unit sphere.
        levels: FSQ's levels; derived from V unless given.
        commitment_weight: weight of the commitment term ("fsq" has none).
        entropy_weight: weight of the entropy terms, by default 0.1 for "lfq", which collapses
            with less, and 0.02 for "bsq" (docs/tokenizer.md has the figures).
        decay: EMA decay of "vq" codes.

    Raises:
        ValueError: a codebook size that the quantizer cannot have.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        kind: QuantizerName = "vq",
        codebook_dim: int | None = None,
        l2_norm: bool = True,
        levels: list[int] | None = None,
        commitment_weight: float = 0.25,
        entropy_weight: float | None = None,
        decay: float = 0.99,
    ):
        super().__init__()
        if codebook_size < 2:
            raise ValueError(f"codebook_size must be at least 2, not {codebook_size}")
        if codebook_size > MAX_CODES:
            raise ValueError(
                f"codebook_size {codebook_size} is more than {MAX_CODES}, beyond which the use of "
                "the codes cannot be counted: take fewer"
            )
        weights = dict(commitment_weight=commitment_weight, entropy_weight=entropy_weight or 0)
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, but is {value}")
        if not 0 <= decay < 1:
            raise ValueError(f"codebook_decay must be in [0, 1), not {decay}")
        if codebook_dim is None:
            codebook_dim = 6 if kind == "simvq" else 16
        if entropy_weight is None:
            entropy_weight = 0.02 if kind == "bsq" else 0.1
        whole("codebook_dim", codebook_dim, 1, MAX_WIDTH)
        if levels is not None and kind != "fsq":
            raise ValueError(f"fsq_levels are given, but the quantizer is {kind!r}: leave them out")
        self.kind = kind
        self.codebook_size = codebook_size
        self.weights = {
            "commitment": commitment_weight,
            "entropy": entropy_weight,
            "diversity": -entropy_weight,
        }
        width = codebook_dim
        if kind == "vq":
            self.inner: nn.Module = VQ(width, codebook_size, decay, l2_norm)
        elif kind == "simvq":
            from vector_quantize_pytorch import SimVQ

            # one of the two terms it adds up has our weight already, the other always 1
            self.inner = SimVQ(
                width, codebook_size, input_to_quantize_commit_loss_weight=commitment_weight
            )
            self.weights["commitment"] = 1.0
        elif kind in ("lfq", "bsq"):
            if codebook_size & (codebook_size - 1):
                raise ValueError(
                    f"codebook_size {codebook_size} is not a power of two, which {kind.upper()} "
                    f"needs; the next one is {1 << codebook_size.bit_length()}"
                )
            width = codebook_size.bit_length() - 1
            self.inner = Binary(width, spherical=kind == "bsq")
        elif kind == "fsq":
            levels = fsq_levels(codebook_size) if levels is None else list(levels)
            if min(levels, default=3) < 3:
                raise ValueError(f"fsq_levels {levels} must be at least 3 each")
            if math.prod(levels) != codebook_size:
                raise ValueError(
                    f"fsq_levels {levels} give {math.prod(levels)} codes, "
                    f"codebook_size says {codebook_size}: leave one of them out"
                )
            width = len(levels)
            self.inner = FSQ(levels)
        else:
            raise ValueError(f"quantizer {kind!r} is unknown: use vq, simvq, lfq, bsq or fsq")
        # what decides ids and shows in no weight
        self.settings = (kind, kind == "vq" and l2_norm, levels)
        self.project_in = nn.Conv2d(dim, width, 1)
        self.project_out = nn.Conv2d(width, dim, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves with the model, but stays in float32 when that is put in half precision."""

        def exactly(tensor: Tensor) -> Tensor:
            like = fn(tensor.new_empty(0))
            coarser = like.is_floating_point() and like.dtype.itemsize < 4
            return tensor.to(like.device) if coarser else fn(tensor)

        return super()._apply(exactly, recurse)

    def forward(self, features: Float[Tensor, "B C h w"]) -> QuantizerOutput:
        # distances and rounding decide between neighbouring codes: too fine for half precision
        with torch.autocast(features.device.type, enabled=False):
            z = self.project_in(features.to(self.project_in.weight.dtype))
            codes, ids, terms = self._quantize(z.flatten(2).transpose(1, 2))
            quantized = self.project_out(codes.transpose(1, 2).reshape(z.shape))
        loss = z.new_zeros(())
        for name, value in terms.items():
            loss = loss + self.weights[name] * value
        ids = ids.long().view(ids.shape[0], *z.shape[-2:])
        occurs = torch.zeros(self.codebook_size, device=ids.device).scatter_(0, ids.flatten(), 1.0)
        return QuantizerOutput(quantized.to(features.dtype), ids, loss, terms, occurs.mean())

    def one_batch(self) -> AbstractContextManager:
        """Within the block the codes of "vq" stay; at its end they learn from all its forwards.

        This is for gradient accumulation; outside of it each training forward is a batch.
        """
        return self.inner.one_batch() if isinstance(self.inner, VQ) else nullcontext()

    def _quantize(self, rows: Float[Tensor, "B n c"]) -> Codes:
        if self.kind == "fsq":
            codes, ids, terms = self.inner(rows)
            # a vector that is not finite would get an id outside of the codebook
            return Codes(codes, ids.clamp(0, self.codebook_size - 1), terms)
        if self.kind == "simvq":
            codes, ids, loss = self.inner(rows)
            return Codes(codes, ids, {"commitment": loss})
        return self.inner(rows)

    def decode(self, ids: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """The quantized feature map that ``forward`` gave together with these ids."""
        inner: Any = self.inner
        look_up = inner.indices_to_codes if self.kind == "simvq" else inner.codes_of
        codes = look_up(ids.flatten(1)).to(self.project_out.weight.dtype).transpose(1, 2)
        return self.project_out(codes.reshape(ids.shape[0], -1, *ids.shape[1:]))
