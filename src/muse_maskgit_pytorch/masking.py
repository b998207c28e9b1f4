"""The corruption that training undoes: mask schedules, drawing the mask, labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .arguments import Missing
from .structures import MaskedTokens

if TYPE_CHECKING:
    ScheduleFunction = Callable[[Tensor], Tensor]  # of one's own: times in [0, 1] -> ratios
else:  # a type of the command line and of recipes, which must not import anything
    ScheduleFunction = None

IGNORE_INDEX = -100  # cross_entropy's default; any code from 0 up would be a legal one


def read_table(table: Sequence[float], u: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """Entries at equal distances from u = 0 to u = 1, linear in between; exact at an entry."""
    values = torch.tensor(table, dtype=u.dtype, device=u.device)
    last = len(values) - 1
    # an entry's own u, such as 2 / 7, is not quite a multiple of 1 / last
    place = (u.double() * last).round(decimals=4)
    below = place.floor().long()
    part = (place - below).to(u.dtype)
    return torch.lerp(values[below], values[(below + 1).clamp(max=last)], part)


# Laws of the mask ratio r by their density up to a factor; two numbers after the name, and bounds.
LAWS: dict[str, tuple[Callable[[Tensor, float, float], Tensor], float]] = {
    "beta": (lambda r, a, b: r ** (a - 1) * (1 - r) ** (b - 1), 0.0),
    "gaussian": (lambda r, mean, std: torch.exp(-(((r - mean) / std) ** 2) / 2), 0.5),
}


@lru_cache
def law_table(law: str) -> tuple[float, ...] | None:
    """Ratios of a law such as "beta:12,3" at equal distances of u, falling; None if it is none.

    They are the quantiles: with u uniform, the ratio has the law's density.

    Raises:
        ValueError: a law that is unknown or without two numbers above 0.
    """
    name, colon, numbers = law.partition(":")
    if not colon:
        return None
    density, lowest = LAWS.get(name, (None, 0.0))
    try:
        first, second = (float(number) for number in numbers.split(","))
    except ValueError:
        first = second = math.nan
    if density is None or not (0 < first < 1e4 and 0 < second < 1e4):
        raise ValueError(
            f"noise_schedule {law!r} is no law: write beta:12,3 or gaussian:0.55,0.25, or "
            "other numbers above 0"
        )
    edges = torch.linspace(lowest, 1, 20_001, dtype=torch.float64, device="cpu")
    mass = density((edges[1:] + edges[:-1]) / 2, first, second).cumsum(0)
    if not 0 < float(mass[-1]) < math.inf:
        raise ValueError(f"noise_schedule {law!r} has no mass that can be counted: take others")
    wanted = torch.linspace(1, 0, 1001, dtype=torch.float64, device="cpu")[1:-1]
    at = torch.searchsorted(mass / mass[-1], wanted)
    return tuple(((edges[at] + edges[at + 1]) / 2).tolist())


def mask_ratio(
    u: Float[Tensor, "*s"], schedule: str | Sequence[float] | ScheduleFunction = "cosine"
) -> Float[Tensor, "*s"]:
    """Share of tokens that are masked at time ``u`` in [0, 1]: 1 at u = 0, 0 at u = 1.

    "cosine" is cos(pi/2 u): with u uniform, the paper's density (2/pi) (1 - r^2)^(-1/2), mean
    0.64 (2.6). "arccos" is 2/pi acos(u), a different law with the same mean, which other code bases
    use under the same name as the first. "beta:12,3" gives ratios of that density (AutoNAT's
    default, Ni et al. 2024; mean 0.8), "gaussian:0.55,0.25" MAGE's (Li et al. 2023): mean and
    spread, cut to [0.5, 1]. "cosine32" and "linear32" are "cosine" and "linear" in single precision
    whatever ``u`` is, as diffusers' `AmusedScheduler` counts: cos(pi/3) is just below 1/2 there,
    and one token may hang on that. A table holds the ratios between that 1 and that 0, at equal
    distances.
    A function of one's own gives the ratios at ``u``.
    """
    if callable(schedule):
        return read_schedule("noise_schedule", schedule, u)
    if not isinstance(schedule, str):
        return read_table([1.0, *schedule, 0.0], u)
    if schedule == "cosine":
        return torch.cos(u * (math.pi / 2))
    if schedule in ("cosine32", "linear32"):
        return mask_ratio(u.float(), schedule[:-2])
    if schedule == "arccos":
        return torch.acos(u) * (2 / math.pi)
    if schedule == "linear":
        return 1 - u
    if schedule == "square":
        return 1 - u**2
    if (quantiles := law_table(schedule)) is not None:
        return read_table([1.0, *quantiles, 0.0], u)
    raise ValueError(f"noise_schedule {schedule!r} is unknown: use cosine, arccos, linear, square")


def read_schedule(
    name: str, schedule: ScheduleFunction, times: Float[Tensor, "*s"]
) -> Float[Tensor, "*s"]:
    """What a function of one's own gives.

    Raises:
        ValueError: no tensor of the shape of the times.
    """
    values: Any = schedule(times)
    if not isinstance(values, Tensor) or values.shape != times.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} {schedule}: must give {tuple(times.shape)}, not {got}")
    return values.to(times)


def check_schedule(name: str, schedule: Any) -> None:
    """Refuse a mask schedule that is unknown or, if a function, no falling share.

    Raises:
        ValueError: says which.
    """
    if isinstance(schedule, Missing):  # a file has it; whoever needs it says so
        return
    u = torch.linspace(0, 1, 101, device="cpu", dtype=torch.float64)
    ratio = mask_ratio(u, schedule)
    good = (ratio >= -1e-6) & (ratio <= 1 + 1e-6)  # False for NaN
    if not bool(good.all()) or bool((ratio.diff() > 1e-6).any()):
        raise ValueError(f"{name} {schedule}: its ratios must fall from 1 to 0 over [0, 1]")


def draw_mask(
    batch: int,
    num_tokens: int,
    schedule: str | ScheduleFunction = "cosine",
    *,
    grid: tuple[int, int] | None = None,
    rectangle_prob: float = 0.0,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "B N"]:
    """Draw for each row a ratio by the schedule, then that many positions, uniformly; at least 1.

    Args:
        grid: height and width in tokens, for rectangles.
        rectangle_prob: share of the rows whose positions form a rectangle somewhere, at most twice
            as long as wide where there is room, as they do in editing. It has the number of
            positions that the law asks for to within half of its height.
        generator: source of randomness, on ``device``; torch's global one by default.
    """
    u = torch.rand(batch, device=device, generator=generator)
    count = (mask_ratio(u, schedule) * num_tokens).round().clamp(min=1)
    order = torch.rand(batch, num_tokens, device=device, generator=generator).argsort(dim=-1)
    mask = order.argsort(dim=-1) < count[:, None]
    if rectangle_prob == 0:
        return mask
    assert grid is not None
    chance, aspect, top, left = torch.rand(4, batch, device=device, generator=generator)
    rows, columns = grid
    height = (count * 4**aspect / 2).sqrt().round().clamp(max=rows)
    height = torch.maximum(height, (count / columns).ceil())
    width = (count / height).round().clamp(1, columns)
    y = torch.arange(rows, device=device)[None] - (top * (rows - height + 1)).floor()[:, None]
    x = torch.arange(columns, device=device)[None] - (left * (columns - width + 1)).floor()[:, None]
    inside = ((y >= 0) & (y < height[:, None]))[:, :, None]
    inside = inside & ((x >= 0) & (x < width[:, None]))[:, None, :]
    return torch.where(chance[:, None] < rectangle_prob, inside.flatten(1), mask)


def mask_tokens(
    ids: Int[Tensor, "B N"],
    mask: Bool[Tensor, "B N"],
    mask_id: int,
    no_mask_token_prob: float = 0.0,
) -> MaskedTokens:
    """Replace the masked ids by ``mask_id``; labels are the true ids there, ignored elsewhere.

    Args:
        no_mask_token_prob: share of the masked positions that keep their id in the input, and
            are predicted all the same (as BERT does; not in the paper).
    """
    labels = torch.where(mask, ids, IGNORE_INDEX)
    hidden = mask
    if no_mask_token_prob > 0:
        hidden = mask & (torch.rand(mask.shape, device=mask.device) >= no_mask_token_prob)
    return MaskedTokens(torch.where(hidden, mask_id, ids), labels, mask)
