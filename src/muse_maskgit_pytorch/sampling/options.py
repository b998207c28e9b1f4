"""How to sample: the numbers that a caller chooses, checked when they are given."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch

from ..masking import read_table
from ..structures import Schedule

T = TypeVar("T")
GuidanceSchedule = Literal["linear", "constant", "cosine"]
Policy = Literal["confidence", "margin", "entropy", "halton", "random", "critic"]

FINITE = (-sys.float_info.max, sys.float_info.max)
SHARE = (0, 1)
NUMBERS = {  # fields that take one number for all rows or one for each, with their ranges
    "timesteps": (1, math.inf),
    "temperature": (0, math.inf),
    "choice_temperature": (0, math.inf),
    "cond_scale": FINITE,
    "remask": SHARE,
    "temperature_end": (0, math.inf),
    "top_k": (0, math.inf),
    "top_p": SHARE,
    "min_p": SHARE,
}
ROW_WISE = (*NUMBERS, "seeds")


@dataclass(frozen=True)
class SampleOptions:
    """How to sample. Each number may also be a sequence with one value per row (image).

    The progress of a step is i / (steps - 1): 0 at the first step, 1 at the last.

    Attributes:
        timesteps: steps from all masked to none (paper 2.8: 24 base, 8 super-resolution).
        temperature: of the token choice, >= 0; 0 takes the most likely token.
        choice_temperature: scale of the Gumbel noise on the log-confidence that ranks the
            positions; falls linearly to 0 over the steps (MaskGIT; not in the Muse paper).
        cond_scale: guidance ``u + cond_scale * (c - u)``; 1 means none. The paper writes
            ``(1+t) c - t u``, so cond_scale = 1 + t (2.7).
        guidance_schedule: share of t at each step: "linear" rises from 0 to 1 (the paper's),
            "cosine" rises as (1 - cos(pi * progress)) / 2 (MDT, Gao et al. 2023), "constant" is
            always 1. Or a table of shares, any numbers, read at the progress with linear
            interpolation: ``[0, 0, 1, 1]`` guides late steps only (Kynkaanniemi et al. 2024).
        noise_schedule: share of tokens still masked as a function of the steps done. Or a table:
            the falling shares in [0, 1] after each step but the last, linearly interpolated.
        policy: which positions to keep. "confidence": those whose drawn token is most likely
            (MaskGIT); "margin": where the two most likely tokens are furthest apart; "entropy":
            where the distribution has the least; "halton": evenly spread (Besnier et al. 2025);
            "random"; "critic": what the model's token critic takes for real. If None, the critic
            of a model that has one, else confidence.
        remask: strength in [0, 1] of re-masking tokens that were already decided, low-confidence
            ones first, while as many more are decided (ReMDM, Wang et al. 2025).
        temperature_end: temperature at the last step, reached linearly; if None, constant.
        top_k: draw from the k most likely tokens only; 0 means all.
        top_p: only from the fewest tokens whose probabilities add up to p; 1 means all.
        min_p: only from tokens at least this fraction as likely as the most likely one.
        seeds: one integer per row, or s for s, s + 1, ... If None, they are drawn from torch's
            global generator. Only their lowest 32 bits count: torch's CPU generator reads no more.

    Raises:
        ValueError: a value out of range or of the wrong kind; the message names the field.
    """

    timesteps: int | Sequence[int] = 24
    temperature: float | Sequence[float] = 1.0
    choice_temperature: float | Sequence[float] = 4.5
    cond_scale: float | Sequence[float] = 3.0
    guidance_schedule: GuidanceSchedule | Sequence[float] = "linear"
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
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        if self.policy is not None:
            _one_of("policy", self.policy, Policy)
        _named_or_table("guidance_schedule", self.guidance_schedule, GuidanceSchedule, FINITE)
        _named_or_table("noise_schedule", ratios := self.noise_schedule, Schedule, SHARE)
        if not isinstance(ratios, str) and list(ratios) != sorted(ratios, reverse=True):
            raise ValueError(f"noise_schedule must fall from step to step, not {ratios}")
        for name, bounds in NUMBERS.items():
            if getattr(self, name) is not None:
                _in_range(name, getattr(self, name), *bounds, whole=name in ("timesteps", "top_k"))

    def replace(self, **changes) -> SampleOptions:
        return replace(self, **changes)

    @property
    def guided(self) -> bool:
        """Whether any row has guidance, so that the text-free branch is needed."""
        scale = self.cond_scale
        return any(s != 1 for s in (scale if isinstance(scale, list) else [scale]))

    # Rows --------------------------------------------------------------------------------------

    def with_rows(self, batch: int) -> SampleOptions:
        """The same options with a list of ``batch`` values in every row-wise field; seeds too.

        Raises:
            ValueError: a list of another length, or seeds that are not whole numbers.
        """
        rows: dict[str, Any] = {
            name: per_row(value, batch, name)
            for name in NUMBERS
            if (value := getattr(self, name)) is not None
        }
        seeds = torch.randint(2**31, (batch,), device="cpu") if self.seeds is None else self.seeds
        return self.replace(**rows, seeds=row_seeds(_plain(seeds), batch))

    def take(self, rows: Sequence[int]) -> SampleOptions:
        """The options of some rows, out of options `with_rows`."""
        lists = {name: getattr(self, name) for name in ROW_WISE}
        kept = {n: [v[row] for row in rows] for n, v in lists.items() if isinstance(v, list)}
        return self.replace(**kept)


def per_row(value: T | Sequence[T], batch: int, name: str) -> list[T]:
    """One value for all rows, or one for each, as a list.

    Raises:
        ValueError: a list of another length.
    """
    if isinstance(value, (Sequence, torch.Tensor)) and not isinstance(value, str):
        if len(value) != batch:
            raise ValueError(f"{name} has {len(value)} values for {batch} images")
        return list(value)
    return [value] * batch  # type: ignore[list-item]


def row_seeds(seeds: int | Sequence[int], batch: int) -> list[int]:
    """One seed for each row: those given, or s, s + 1, ...

    Raises:
        ValueError: another number of them, or values that are not integers of at most 64 bits.
    """
    if isinstance(seeds, Integral):
        seeds = range(int(seeds), int(seeds) + batch)
    given = per_row(seeds, batch, "seeds")
    if not all(isinstance(seed, Integral) and -(2**63) <= seed < 2**64 for seed in given):
        raise ValueError(f"seeds must be whole numbers of at most 64 bits, not {given}")
    return [int(seed) for seed in given]


def upgraded(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as files of earlier versions hold them, in today's terms.

    Guidance in an interval is a table now, with an entry for each step; guidance by the
    low-resolution image is gone.

    Raises:
        ValueError: settings that have no equivalent.
    """
    values = dict(saved)
    scale = values.pop("lowres_scale", 1.0)
    ends = values.pop("guidance_start", 1 / 3), values.pop("guidance_end", 1.0)
    if any(s != 1 for s in (scale if isinstance(scale, Sequence) else [scale])):
        raise ValueError(f"lowres_scale {scale} is not supported any more")
    if values.get("guidance_schedule") == "interval":
        steps = values.get("timesteps", SampleOptions.timesteps)
        if any(isinstance(value, Sequence) for value in (*ends, steps)):
            raise ValueError("guidance intervals that differ from row to row are not supported")
        progress = [i / (steps - 1) for i in range(steps)] if steps > 1 else [1.0]
        values["guidance_schedule"] = [float(ends[0] <= p <= ends[1]) for p in progress]
    return values


def guidance_share(
    progress: torch.Tensor, schedule: GuidanceSchedule | Sequence[float]
) -> torch.Tensor:
    """The share of the guidance at each step (S,); see `SampleOptions`."""
    if not isinstance(schedule, str):
        return read_table(schedule, progress)
    if schedule == "linear":
        return progress
    if schedule == "cosine":
        return (1 - torch.cos(math.pi * progress)) / 2
    return torch.ones_like(progress)


def _plain(value: Any) -> Any:
    """Arrays, tensors and tuples as lists; NumPy's and torch's scalars as Python's."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _one_of(name: str, value: object, kind: object, more: str = "") -> None:
    if value not in get_args(kind):
        raise ValueError(f"{name} must be one of {get_args(kind)}{more}, not {value!r}")


def _named_or_table(name: str, value: Any, kind: object, bounds: tuple[float, float]) -> None:
    if not isinstance(value, list):
        return _one_of(name, value, kind, " or a table of numbers")
    if not value:
        raise ValueError(f"{name} is an empty table: give one number for each step")
    return _in_range(name, value, *bounds)


def _in_range(name: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    for number in value if isinstance(value, list) else [value]:
        if whole and not isinstance(number, int):
            raise ValueError(f"{name} must be whole numbers, not {value}")
        if not low <= number <= high:  # also refuses NaN
            wanted = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            wanted = "finite" if (low, high) == FINITE else wanted
            raise ValueError(f"{name} must be {wanted}, not {number}")
