"""The token choice: from logits and one uniform number per position to ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FEW = 64  # likeliest tokens: up to so many torch selects faster than NumPy
CHUNK = 2**19  # numbers that a CPU's caches hold: so many logits are looked at together


def _is_cpu(x: Tensor) -> bool:
    """Whether to go the CPU's ways: by NumPy, in chunks, and with a look at the values.

    A GPU would have to wait for such a look, and a compiled graph would break there.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@torch.no_grad()
def choose_tokens(
    logits: Float[Tensor, "B K V"],
    temperature: Float[Tensor, " B"],
    uniform: Float[Tensor, "B K"],
    top_k: Int[Tensor, " B"] | None = None,
    top_p: Float[Tensor, " B"] | None = None,
    min_p: Float[Tensor, " B"] | None = None,
) -> tuple[Int[Tensor, "B K"], Float[Tensor, "B K"]]:
    """Draw from softmax(logits / temperature) by inverse CDF, in float32.

    ``top_k`` (0: off), ``top_p`` and ``min_p`` are each evaluated on that distribution. A token
    must pass all of them; the most likely one always does.

    Returns:
        ids, and their log-probabilities at temperature 1, without the limits.
    """
    batch, count, codes = logits.shape
    size = max(1, CHUNK // codes if _is_cpu(logits) else batch * count)
    settings: list[Any] = [
        None if value is None else value.repeat_interleave(count).split(size)
        for value in (temperature, top_k, top_p, min_p)
    ]
    chunks = logits.flatten(0, 1).split(size)
    drawn = [
        _choose(chunk, points, *(value and value[i] for value in settings))
        for i, (chunk, points) in enumerate(zip(chunks, uniform.flatten().split(size), strict=True))
    ]
    ids, log_probs = (torch.cat(parts).view(batch, count) for parts in zip(*drawn, strict=True))
    return ids, log_probs


def _choose(
    logits: Float[Tensor, "R V"],
    uniform: Float[Tensor, " R"],
    temperature: Float[Tensor, " R"],
    top_k: Int[Tensor, " R"] | None,
    top_p: Float[Tensor, " R"] | None,
    min_p: Float[Tensor, " R"] | None,
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"]]:
    logits, on_cpu = logits.float(), _is_cpu(logits)
    greedy = temperature == 0
    divisor = torch.where(greedy, 1.0, temperature).clamp(min=1e-30).unsqueeze(-1)
    top = logits.amax(dim=-1, keepdim=True)
    # subtract the largest first: tiny temperatures would make it infinite
    weights = (logits - top).div_(divisor).exp_()  # the largest is 1
    plain = on_cpu and bool((temperature == 1).all())
    total = (weights if plain else (logits - top).exp_()).sum(dim=-1, keepdim=True)
    if top_k is not None or top_p is not None:
        weights = torch.where(_most_likely(weights, top_k, top_p), weights, 0.0)
    if min_p is not None:
        weights = torch.where(weights >= min_p[:, None], weights, 0.0)
    cdf = weights.cumsum(dim=-1)
    point = uniform[:, None] * cdf[:, -1:]
    ids = torch.searchsorted(cdf, point, right=True).clamp(max=logits.shape[-1] - 1)
    if not on_cpu or bool(greedy.any()):
        ids = torch.where(greedy[:, None], logits.argmax(dim=-1, keepdim=True), ids)
    log_prob = logits.gather(-1, ids) - top - total.log()
    return ids.squeeze(-1), log_prob.squeeze(-1)


def _most_likely(
    weights: Float[Tensor, "R V"],
    top_k: Int[Tensor, " R"] | None,
    top_p: Float[Tensor, " R"] | None,
) -> Bool[Tensor, "R V"]:
    """Which tokens are among the k most likely, and needed to add up to the probability p.

    Among equals, the first in the codebook win.
    """
    codes = weights.shape[-1]
    count = torch.full_like(weights[:, 0], codes, dtype=torch.long)
    if top_k is not None:
        count = torch.where(top_k == 0, count, top_k.clamp(max=codes))
    select = _select_on_cpu if _is_cpu(weights) else _select
    least, count, tied = select(weights, count, top_p)
    above = weights >= least
    if not tied:
        return above
    above, equal = weights > least, weights == least
    left = count[:, None] - above.sum(dim=-1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= left))


def _select_on_cpu(
    weights: Float[Tensor, "R V"], count: Int[Tensor, " R"], top_p: Float[Tensor, " R"] | None
) -> tuple[Float[Tensor, "R 1"], Int[Tensor, " R"], bool]:
    """The least weight to keep, how many are kept, and whether more of them are equal to it.

    NumPy selects and sorts with SIMD: thirty times as fast as torch on 4,096 codes, but for a few.
    """
    codes = weights.shape[-1]
    limited = count < codes
    # the likeliest ones that have to be looked at, in descending order
    size = codes if top_p is not None else min(codes, 1 + max(1, int((count * limited).max())))
    if size <= FEW:
        heads = weights.topk(size, dim=-1).values
    else:
        values = weights.numpy()
        if size < codes:
            values = np.partition(values, codes - size, axis=-1)[:, codes - size :]
        heads = torch.from_numpy(np.sort(values, axis=-1)[:, ::-1].copy())
    if top_p is not None:
        sums = heads.cumsum(dim=-1)
        needed = torch.searchsorted(sums, top_p[:, None] * sums[:, -1:]).squeeze(-1) + 1
        count = torch.where(top_p == 1, count, count.minimum(needed))  # no rounding at 1
        limited = count < codes
    place = torch.where(limited, count, 1)[:, None]
    least = torch.where(limited[:, None], heads.gather(-1, place - 1), 0.0)
    after = heads.gather(-1, place.clamp(max=heads.shape[-1] - 1))
    # weights of 0 are never drawn, however many there are
    tied = (after == least) & (least > 0)
    return least, count, bool(tied.any())


def _select(
    weights: Float[Tensor, "R V"], count: Int[Tensor, " R"], top_p: Float[Tensor, " R"] | None
) -> tuple[Float[Tensor, "R 1"], Int[Tensor, " R"], bool]:
    """The same without sorting and without waiting for an answer, by bisection.

    Non-negative floats are ordered as the integers of the same bits are, so 30 halvings find the
    largest weight that still keeps enough.
    """
    p = torch.ones_like(weights[:, :1]) if top_p is None else top_p[:, None]
    wanted = p * weights.sum(dim=-1, keepdim=True)
    low = torch.zeros_like(count, dtype=torch.int32)[:, None]  # keeps all
    high = torch.full_like(low, 0x3F800001)  # the bits of 1.0, and one more: keeps none
    for _ in range(30):
        middle = low + (high - low) // 2
        kept = weights >= middle.view(torch.float32)
        mass = torch.where(kept, weights, 0.0).sum(dim=-1, keepdim=True)
        enough = (kept.sum(dim=-1, keepdim=True) >= count[:, None]) | ((mass >= wanted) & (p < 1))
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    least = low.view(torch.float32)
    # how many of those equal to the least are needed
    above = weights > least
    mass = torch.where(above, weights, 0.0).sum(dim=-1, keepdim=True)
    equal = ((wanted - mass) / least.clamp(min=1e-30)).ceil().clamp(1, weights.shape[-1])
    needed = above.sum(dim=-1, keepdim=True) + equal.long()
    count = torch.where(p == 1, count[:, None], needed.minimum(count[:, None])).squeeze(-1)
    return least, count, True
