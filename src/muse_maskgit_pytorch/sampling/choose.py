"""The token choice: from logits and one uniform number per position to ids."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


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
    logits = logits.float()
    greedy = (temperature == 0)[:, None]
    divisor = torch.where(greedy, 1.0, temperature[:, None]).clamp(min=1e-30).unsqueeze(-1)
    # subtract the largest first: tiny temperatures would make it infinite
    probs = ((logits - logits.amax(dim=-1, keepdim=True)) / divisor).softmax(dim=-1)
    if top_k is not None or top_p is not None:
        probs = probs * _most_likely(probs, top_k, top_p)
    if min_p is not None:
        probs = probs * (probs >= min_p[:, None, None] * probs.amax(dim=-1, keepdim=True))
    cdf = probs.cumsum(dim=-1)
    point = (uniform * cdf[..., -1]).unsqueeze(-1)
    drawn = torch.searchsorted(cdf, point, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    ids = torch.where(greedy, logits.argmax(dim=-1), drawn)
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return ids, chosen - logits.logsumexp(dim=-1)


def _most_likely(probs: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Which tokens are among the k most likely, and needed to add up to the probability p.

    Among equals, the first in the codebook win.
    """
    ordered = _descending(probs)
    count = torch.full_like(probs[..., :1], probs.shape[-1], dtype=torch.long)
    if top_k is not None:
        k = top_k[:, None, None]
        count = count.where(k == 0, k.clamp(max=probs.shape[-1]))
    if top_p is not None:
        p = top_p[:, None, None].expand_as(count).to(probs.dtype)
        needed = torch.searchsorted(ordered.cumsum(dim=-1), p.contiguous()) + 1
        count = count.where(p == 1, count.minimum(needed))  # no rounding at 1
    least = ordered.gather(-1, count - 1)
    above, equal = probs > least, probs == least
    left = count - above.count_nonzero(dim=-1).unsqueeze(-1)
    return above | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= left))


def _descending(values: Tensor) -> Tensor:
    """Sorted along the last axis, greatest first."""
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True).values
    # NumPy sorts with SIMD: thirty times as fast on 4,096 codes
    return torch.from_numpy(np.sort(values.detach().numpy(), axis=-1)).flip(-1)
