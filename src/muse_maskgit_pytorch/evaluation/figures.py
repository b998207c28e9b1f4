"""Figures with what they rest on: the number of images, an interval, what to know of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

RESAMPLES = 1000  # of the bootstrap, for what is a mean
FEW_RESAMPLES = 20  # for what costs seconds each
AT_ONCE = 2**20  # numbers that are drawn at a time
LEVEL = 0.95  # of all intervals
SUBSETS, LEAST = 10, 5  # disjoint parts of the prompts, and how many there must be in each
# Student's t at 97.5 %, by the number of subsets less one.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NORMAL = 1.960

Interval = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """One figure, from how many images, and what to know when reading it.

    Attributes:
        value: the figure.
        images: judged.
        note: its unit, the other things it depends on.
        interval: in which 95 of 100 such figures lie, other prompts being drawn; None: not known.
        truth: the same of the true images, where that is not known beforehand.
    """

    value: float
    images: int
    note: str
    interval: Interval | None = None
    truth: float | None = None


def resamples(prompts: int, count: int) -> Iterator[Int[Tensor, "K B"]]:
    """Numbers of prompts, drawn with replacement, some draws at a time; the same in every call."""
    generator = torch.Generator().manual_seed(0)
    some = max(1, AT_ONCE // prompts)
    for at in range(0, count, some):
        yield torch.randint(prompts, (min(some, count - at), prompts), generator=generator)


def bootstrap_mean(
    values: Float[Tensor, "B ..."], counted: Bool[Tensor, "B ..."] | None = None
) -> tuple[float, Interval | None]:
    """A mean, and where it lies when prompts are drawn anew: the percentile bootstrap.

    Prompts are drawn as a whole, with all their pictures, which are alike.

    Args:
        values: of each prompt, or of each of its pictures.
        counted: which of them there are; None: all.

    Returns:
        the mean; its interval, None of fewer than two prompts.

    Raises:
        ValueError: there is not one.
    """
    counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
    counts = counted.flatten(1).sum(1) if counted.ndim > 1 else counted.long()
    values = values.double().where(counted, 0.0)
    sums = values.flatten(1).sum(1) if values.ndim > 1 else values
    if not counts.sum():
        raise ValueError("a mean needs at least one value")
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return mean, None
    drawn = torch.cat(
        [sums[rows].sum(1) / counts[rows].sum(1) for rows in resamples(len(sums), RESAMPLES)]
    )
    drawn = drawn[drawn.isfinite()]  # a draw may be without any value
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = drawn.quantile(edges).tolist()
    return mean, (low, high)


def bootstrap_spread(
    value: float, prompts: int, figure: Callable[[Tensor], float], least: float = -math.inf
) -> Interval | None:
    """An interval as wide as the figures of drawn prompts differ, around the figure of all.

    For what resampling moves, as it moves FID: repeated images look like less variety.

    Args:
        value: the figure.
        prompts: how many there are.
        figure: of prompts by their numbers.
        least: what no figure is below.
    """
    if prompts < 2:
        return None
    draws = (rows for some in resamples(prompts, FEW_RESAMPLES) for rows in some)
    look = dict(total=FEW_RESAMPLES, desc="interval", delay=2, leave=False, dynamic_ncols=True)
    drawn = torch.tensor([figure(rows) for rows in tqdm(draws, **look)])
    half = NORMAL * float(drawn.double().std())
    return max(least, value - half), value + half


def subset_interval(
    value: float, prompts: int, figure: Callable[[Tensor], float], least: float = -math.inf
) -> tuple[Interval | None, str]:
    """An interval by the figures of disjoint subsets of the prompts, around the figure of all.

    For kernel distances, which repeated images would make wrong. Their mean varies at least as
    much as the figure of all, so the interval is rather too wide.

    Args:
        value: the figure.
        prompts: how many there are.
        figure: of prompts by their numbers.
        least: what no figure is below.

    Returns:
        the interval, and a note of the subsets.
    """
    count = min(SUBSETS, prompts // LEAST)
    if count < 2:
        return None, f"fewer than {2 * LEAST} prompts give no interval"
    order = torch.randperm(prompts, generator=torch.Generator().manual_seed(0))
    parts = torch.tensor([figure(part) for part in order.tensor_split(count)]).double()
    half = STUDENT[count - 2] * float(parts.std()) / math.sqrt(count)
    return (max(least, value - half), value + half), f"interval by {count} subsets"
