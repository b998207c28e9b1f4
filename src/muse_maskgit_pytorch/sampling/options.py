"""How to sample: the numbers that a caller chooses, checked when they are given."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..arguments import one_of, plain, real, shown, whole
from ..masking import ScheduleFunction, check_schedule, read_schedule, read_table
from ..structures import Schedule
from .policies import Policy, Score, check_policy

T = TypeVar("T")
GuidanceSchedule = Literal["linear", "constant", "cosine"]

MOST = 2**31 - 1  # of steps and of tokens to choose from: fits into a tensor
SHARE = (0, 1)
COUNTS = {"timesteps": (1, MOST), "top_k": (0, MOST)}
NUMBERS: dict[str, tuple[float | None, float | None]] = {
    # fields that take one number for all rows or one for each, with their ranges
    "temperature": (0, None),
    "choice_temperature": (0, None),
    "cond_scale": (None, None),
    "remask": SHARE,
    "temperature_end": (0, None),
    "top_p": SHARE,
    "min_p": SHARE,
    **COUNTS,
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
            interpolation: ``[0, 0, 1, 1]`` guides late steps only (Kynkaanniemi et al. 2024). Or
            a function of the progress (S,) that gives the shares (S,).
        noise_schedule: share of tokens still masked as a function of the steps done. Or a table:
            the falling shares in [0, 1] after each step but the last, linearly interpolated. Or a
            function of the share of steps done (S,), falling from 1 to 0.
        policy: which positions to keep. "confidence": those whose drawn token is most likely
            (MaskGIT); "margin": where the two most likely tokens are furthest apart; "entropy":
            where the distribution has the least; "halton": evenly spread (Besnier et al. 2025);
            "random"; "critic": what the model's token critic takes for real. If None, the critic
            of a model that has one, else confidence. Or a name or function of one's own
            (`policies`): logits (B, K, V) and log-probabilities (B, K) of the tokens drawn ->
            scores (B, K), highest kept.
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
    guidance_schedule: GuidanceSchedule | Sequence[float] | ScheduleFunction = "linear"
    noise_schedule: Schedule | Sequence[float] | ScheduleFunction = "cosine"
    policy: Policy | Score | None = None
    remask: float | Sequence[float] = 0.0
    temperature_end: float | Sequence[float] | None = None
    top_k: int | Sequence[int] = 0
    top_p: float | Sequence[float] = 1.0
    min_p: float | Sequence[float] = 0.0
    seeds: int | Sequence[int] | None = None

    def __post_init__(self):
        if self.policy is not None:
            check_policy(self.policy)
        for name, kind in (("guidance_schedule", GuidanceSchedule), ("noise_schedule", Schedule)):
            object.__setattr__(self, name, _schedule(name, getattr(self, name), kind))
        for name, bounds in NUMBERS.items():
            if (value := getattr(self, name)) is not None or name in REQUIRED:
                check = whole if name in COUNTS else real
                object.__setattr__(self, name, _numbers(name, value, check, bounds))
        seeds = None if self.seeds is None else _numbers("seeds", self.seeds, _seed)
        object.__setattr__(self, "seeds", seeds)

    def replace(self, **changes: Any) -> SampleOptions:
        """The same with other values.

        Raises:
            ValueError: a name that is no field (the nearest one is named), a bad value.
        """
        return replace(self, **known_fields(changes))

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
        return self.replace(**rows, seeds=row_seeds(seeds, batch))

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
    if isinstance(value, (Sequence, Tensor)) and not isinstance(value, (str, bytes)):
        if len(value) != batch:
            raise ValueError(f"{name} has {len(value)} values for {batch} images")
        return list(value)
    return [value] * batch  # type: ignore[list-item]


def row_seeds(seeds: int | Sequence[int] | Tensor, batch: int) -> list[int]:
    """One seed for each row: those given, or s, s + 1, ...

    Raises:
        ValueError: another number of them, or values that are not integers of at most 64 bits.
    """
    given = _numbers("seeds", seeds, _seed)
    if isinstance(given, int):
        given = [_seed("seeds", given + row) for row in range(batch)]
    return per_row(given, batch, "seeds")


def known_fields(settings: Mapping[str, Any], also: Iterable[str] = ()) -> Mapping[str, Any]:
    """Settings of which each is a field of `SampleOptions`.

    Args:
        settings: by name.
        also: names that may have been meant instead, for the message.

    Raises:
        ValueError: another name; the nearest known one is named.
    """
    known = [field.name for field in fields(SampleOptions)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), [*known, *also], n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise ValueError(f"SampleOptions has no {shown(name)}{hint}")
    return settings


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
    progress: Tensor, schedule: GuidanceSchedule | Sequence[float] | ScheduleFunction
) -> Tensor:
    """The share of the guidance at each step (S,); see `SampleOptions`."""
    if callable(schedule):
        return read_schedule("guidance_schedule", schedule, progress)
    if not isinstance(schedule, str):
        return read_table(schedule, progress)
    if schedule == "linear":
        return progress
    if schedule == "cosine":
        return (1 - torch.cos(math.pi * progress)) / 2
    return torch.ones_like(progress)


REQUIRED = {field.name for field in fields(SampleOptions) if field.default is not None}


def _schedule(name: str, value: Any, kind: object) -> Any:
    """A name, a function, or a table as a list, checked."""
    value = value if callable(value) else plain(value)
    if not isinstance(value, list):
        if not callable(value):
            return one_of(name, value, kind, ", a table of numbers or a function")
        if name == "noise_schedule":
            check_schedule(name, value)
        return value
    if not value:
        raise ValueError(f"{name} is an empty table: give one number for each step")
    bounds = SHARE if name == "noise_schedule" else (None, None)
    table = [real(name, number, *bounds) for number in value]
    if name == "noise_schedule" and table != sorted(table, reverse=True):
        raise ValueError(f"{name} must fall from step to step, not {shown(table)}")
    return table


def _numbers(
    name: str, value: Any, check: Callable[..., T], bounds: tuple[Any, Any] = (None, None)
) -> T | list[T]:
    """One checked number, or a list of them."""
    value = plain(value)
    if isinstance(value, list):
        return [check(name, number, *bounds) for number in value]
    return check(name, value, *bounds)


def _seed(name: str, value: Any, low: None = None, high: None = None) -> int:
    return whole(name, value, -(2**63), 2**64 - 1)
