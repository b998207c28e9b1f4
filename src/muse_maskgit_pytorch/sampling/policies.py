"""Policies: which positions to keep.

A policy that judges drawn tokens is a function in `SCORES`; one that fixes the order beforehand is
a function in `ORDERS`. One's own gets a name in one line, without a change to this package::

    from muse_maskgit_pytorch.sampling import SCORES

    SCORES["gap"] = lambda logits, log_prob: log_prob - logits.logsumexp(-1)
    muse("a red apple", policy="gap")

or is given itself: ``policy=gap``. A record and a model file can repeat a name, where it is
registered; of a function that was given they know what it was called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..arguments import shown

if TYPE_CHECKING:
    Score = Callable[[Tensor, Tensor], Tensor]
    Order = Callable[[Tensor, tuple[int, int]], Tensor]
else:  # as `masking.ScheduleFunction`
    Score = Order = None
Policy = Literal["confidence", "margin", "entropy", "halton", "random", "critic"]


def confidence(
    logits: Float[Tensor, "B K V"], log_prob: Float[Tensor, "B K"]
) -> Float[Tensor, "B K"]:
    """Log-probability of the token drawn (MaskGIT, Chang et al. 2022)."""
    return log_prob


def margin(logits: Float[Tensor, "B K V"], log_prob: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """log(p1 - p2) of the two most likely tokens (Kim et al. 2025); the log suits Gumbel noise."""
    first, second = logits.softmax(dim=-1).topk(2).values.unbind(-1)
    return (first - second).clamp(min=torch.finfo(first.dtype).tiny).log()


def entropy(logits: Float[Tensor, "B K V"], log_prob: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Negative entropy of the token's distribution, in nats."""
    return -torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


SCORES: dict[Any, Score] = {
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
}


def random_order(noise: Float[Tensor, " N"], grid: tuple[int, int]) -> Int[Tensor, " N"]:
    return noise.argsort().argsort()


def rolled_halton(noise: Float[Tensor, " N"], grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """`halton_order`, starting at the cell that the noise chooses, wrapped around the edges."""
    row, column = divmod(int(noise.argmax()), grid[1])
    return halton_order(*grid).roll((row, column), (0, 1)).flatten()


ORDERS: dict[Any, Order] = {
    "halton": rolled_halton,
    "random": random_order,
}


def check_policy(policy: Any) -> None:
    """Refuse what is neither a name nor a function.

    Raises:
        ValueError: naming the policies there are.
    """
    known = (*SCORES, *ORDERS, "critic")
    if not callable(policy) and not (isinstance(policy, str) and policy in known):
        raise ValueError(
            f"policy must be one of {known} or a function of logits and log-probabilities, not "
            f"{shown(policy)}"
        )


def score_of(
    policy: Policy | Score, logits: Float[Tensor, "B K V"], log_prob: Float[Tensor, "B K"]
) -> Float[Tensor, "B K"]:
    """How much a policy of `SCORES`, or one's own, wants to keep each of the drawn tokens.

    Raises:
        ValueError: a function of one's own that gives another shape.
    """
    scores = (policy if callable(policy) else SCORES[policy])(logits, log_prob)
    if not isinstance(scores, Tensor) or scores.shape != log_prob.shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"policy {policy}: its scores must be {tuple(log_prob.shape)}, not {got}")
    return scores.to(log_prob.dtype)


@lru_cache
def halton_order(height: int, width: int) -> Int[Tensor, "h w"]:
    """Turn, from 0, of each cell of a grid: when the 2-D Halton sequence first falls into it.

    Rows follow the sequence of base 2, columns that of base 3, so that the first cells are evenly
    spread, however many are taken (Besnier et al. 2025, Halton Scheduler for MaskGIT).
    """
    cells, points = height * width, 4 * height * width
    while True:
        index = torch.arange(points, device="cpu")
        cell = _halton(index, 2, height) * width + _halton(index, 3, width)
        first = torch.full((cells,), points, device="cpu").scatter_reduce(0, cell, index, "amin")
        if first.max() < points:  # every cell was met
            return first.argsort().argsort().view(height, width)
        points *= 2


def _halton(index: Tensor, base: int, size: int) -> Tensor:
    """floor(size * radical inverse of the index), in integers, so exactly."""
    mirrored, scale = torch.zeros_like(index), 1
    while scale < len(index):
        mirrored = mirrored * base + index % base
        index, scale = index // base, scale * base
    return mirrored * size // scale
