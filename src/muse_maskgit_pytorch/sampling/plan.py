"""The plan: everything that varies is fixed before the loop, one row per image, on the CPU.

So a row's result depends on its own seed and settings alone, and rows of different plans can be
joined into one batch and taken apart again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..masking import ScheduleFunction, mask_ratio
from ..structures import Schedule
from .options import ROW_WISE, SampleOptions, guidance_share, per_row
from .policies import ORDERS

NO_LIMIT = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
ONES = {"temperature": 1.0, "cond_scale": 1.0}  # in the steps that a row lacks; the rest is 0


@dataclass(frozen=True)
class SamplePlan:
    """What each row does at each of its own steps; S is the largest number of steps of any row.

    Attributes:
        num_masked: tokens still masked after each step.
        num_remasked: how many of them had been decided before.
        left: how many steps follow each one.
        temperature: of the token choice, at each step.
        choice_temperature: scale of the noise on the scores, at each step.
        cond_scale: guidance at each step.
        uniform: noise of the token choice, one number per position.
        gumbel: noise on the order of the positions.
        order: each position's turn, for policies that fix it beforehand.
        known: tokens given by the canvas, which never change.
        top_k: limit of the token choice; None where no row has any. Likewise
        top_p, min_p.
        policies: those of the rows, each once; see `SampleOptions`.
        which: each row's place among them; None where all have the same.
    """

    num_masked: Int[Tensor, "B S"]
    num_remasked: Int[Tensor, "B S"]
    left: Int[Tensor, "B S"]
    temperature: Float[Tensor, "B S"]
    choice_temperature: Float[Tensor, "B S"]
    cond_scale: Float[Tensor, "B S"]
    uniform: Float[Tensor, "B S N"]
    gumbel: Float[Tensor, "B S N"]
    order: Float[Tensor, "B N"]
    known: Bool[Tensor, "B N"]
    top_k: Int[Tensor, " B"] | None = None
    top_p: Float[Tensor, " B"] | None = None
    min_p: Float[Tensor, " B"] | None = None
    policies: tuple[Any, ...] = (None,)  # of Policy, Score or None
    which: Int[Tensor, " B"] | None = None

    @property
    def num_steps(self) -> int:
        return self.num_masked.shape[1]

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> SamplePlan:
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def rows(self, rows: slice | Tensor) -> SamplePlan:
        return replace(self, **{name: value[rows] for name, value in self._tensors().items()})

    def lasting(self, steps: int) -> SamplePlan:
        """With so many steps: further ones do nothing, and those beyond are cut off."""
        changed = {
            name: _padded(value, steps, ONES.get(name, 0.0))
            for name, value in self._tensors().items()
            if name not in ("order", "known", "which", *NO_LIMIT)
        }
        return replace(self, **changed)

    def of(self, policies: tuple[Any, ...]) -> SamplePlan:
        """The same with a table of other policies, of which every row's must be one."""
        if policies == self.policies:
            return self
        places = [policies.index(p) if p in policies else 0 for p in self.policies]
        table = torch.tensor(places, device=self.known.device)
        which = table.new_zeros(len(self.known)) if self.which is None else self.which
        which = None if len(policies) == 1 else table[which]
        return replace(self, policies=policies, which=which)

    def cat(self, other: SamplePlan) -> SamplePlan:
        """Another plan's rows after these; the shorter rows do nothing in the steps they lack.

        Raises:
            ValueError: the policy "critic" with another one, since it takes a pass more.
        """
        policies = tuple(dict.fromkeys([*self.policies, *other.policies]))
        if "critic" in policies and len(policies) > 1:
            others = [policy for policy in policies if policy != "critic"]
            raise ValueError(f"policies 'critic' and {others[0]!r} cannot share a batch")
        if policies != self.policies or policies != other.policies:
            return self.of(policies).cat(other.of(policies))
        steps = max(self.num_steps, other.num_steps)
        joined = {}
        for name in vars(self).keys() - {"policies"}:
            pair = [getattr(plan, name) for plan in (self, other)]
            if name == "which" and pair[0] is None:
                continue
            if name in NO_LIMIT:
                present = next((value for value in pair if value is not None), None)
                if present is None:
                    continue
                pair = [
                    present.new_full((len(plan.known),), NO_LIMIT[name]) if value is None else value
                    for plan, value in zip((self, other), pair, strict=True)
                ]
            elif name not in ("order", "known", "which"):
                pair = [_padded(value, steps, ONES.get(name, 0.0)) for value in pair]
            joined[name] = torch.cat(pair)
        return replace(self, **joined)


def _padded(value: Tensor, steps: int, fill: float) -> Tensor:
    extra = steps - value.shape[1]
    return F.pad(value, (0, 0) * (value.ndim - 2) + (0, extra), value=fill)


def masked_counts(
    num_masked: int,
    timesteps: int,
    schedule: Schedule | Sequence[float] | ScheduleFunction = "cosine",
) -> list[int]:
    """How many of ``num_masked`` tokens are still masked after each step; the last is 0.

    floor(n * ratio(i / timesteps)), and at least one token is decided in every step. With fewer
    tokens than steps, the row is done early.
    """
    steps = min(timesteps, num_masked)
    u = torch.arange(1, steps + 1, dtype=torch.float64, device="cpu") / max(steps, 1)
    counts, before = [], num_masked
    for i, wanted in enumerate((mask_ratio(u, schedule) * num_masked).floor().int().tolist(), 1):
        before = max(min(wanted, before - 1), steps - i)
        counts.append(before)
    return counts + [0] * (timesteps - steps)


def stream_seed(seed: int, stream: str) -> int:
    """The seed of a stream of random numbers that is independent of the seed's own.

    Every stage but the first, every window and iteration of an edit and every critic draws from a
    stream of its own: with the same noise twice, a second stage would repeat the first one's
    choices. "" is the seed's own stream.
    """
    if not stream:
        return seed
    digest = hashlib.sha256(f"{seed % 2**32}/{stream}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def make_plan(
    mask: Bool[Tensor, "B N"],
    options: SampleOptions,
    grid: tuple[int, int] | None = None,
    stream: str = "",
) -> SamplePlan:
    """Fix everything that sampling will need, on the CPU.

    A row has at most as many steps as there are tokens, however many were asked for: each decides
    at least one. Noise comes from one generator per row, on the CPU: one seed gives one noise on
    every device.

    Args:
        mask: what the canvas leaves open.
        options: see `SampleOptions`.
        grid: height and width of the tokens, for Halton order; a square by default.
        stream: which of the seed's streams to draw from (`stream_seed`).

    Raises:
        ValueError: a number of values or seeds that differs from the number of rows; a grid
            without N cells.
    """
    batch, num_tokens = mask.shape
    mask = mask.cpu()
    options = options.with_rows(batch)
    grid = grid or (math.isqrt(num_tokens), math.isqrt(num_tokens))
    if options.policy == "halton" and grid[0] * grid[1] != num_tokens:
        raise ValueError(f"policy 'halton' needs the grid of {num_tokens} tokens, not {grid}")

    with torch.device("cpu"):
        most = min(max(per_row(options.timesteps, batch, "timesteps")), num_tokens)
        rows = [_row(mask[row], options.take([row]), grid, stream, most) for row in range(batch)]
        limits = {
            name: torch.tensor(values, dtype=torch.long if name == "top_k" else torch.float32)
            for name, values in ((name, getattr(options, name)) for name in NO_LIMIT)
            if any(value != NO_LIMIT[name] for value in values)
        }
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return SamplePlan(**tensors, known=~mask, **limits, policies=(options.policy,))


def _row(
    mask: Bool[Tensor, " N"],
    options: SampleOptions,
    grid: tuple[int, int],
    stream: str,
    most: int,
) -> dict[str, Tensor]:
    """One row of the plan, padded to ``most`` steps."""
    values = {n: v[0] for n in ROW_WISE if (v := getattr(options, n)) is not None}
    steps, open_tokens = min(values["timesteps"], len(mask)), int(mask.sum())
    counts = torch.tensor(masked_counts(open_tokens, steps, options.noise_schedule))
    # ReMDM's largest probability, min(1, masked after / decided before), gives this many
    decided = open_tokens - torch.cat([torch.tensor([open_tokens]), counts[:-1]])
    remasked = (torch.minimum(decided, counts) * values["remask"]).long()

    last = min(steps, open_tokens) - 1  # the ramps end where the row does
    done = torch.ones(steps, dtype=torch.float32)
    if last > 0:
        done = (torch.arange(steps, dtype=torch.float32) / last).clamp(max=1)
    start = values["temperature"]
    temperature = start + (values.get("temperature_end", start) - start) * done
    choice = values["choice_temperature"] * (1 - done)
    scale = 1 + (values["cond_scale"] - 1) * guidance_share(done, options.guidance_schedule)

    generator = torch.Generator().manual_seed(stream_seed(values["seeds"], stream))
    noise = torch.rand(steps, 2, len(mask), generator=generator, dtype=torch.float32)
    if options.policy == "critic":
        generator.manual_seed(stream_seed(values["seeds"], f"{stream} critic"))
        noise[:, 1] = torch.rand(steps, len(mask), generator=generator, dtype=torch.float32)
    gumbel = -torch.log(-torch.log(noise[:, 1].clamp(1e-9, 1 - 1e-7)))
    order = torch.zeros(len(mask), dtype=torch.float32)
    if not callable(options.policy) and options.policy in ORDERS:
        order = ORDERS[options.policy](gumbel[0], grid).float()
        choice = torch.zeros_like(done)
    by_step = {
        "num_masked": counts,
        "num_remasked": remasked,
        "left": (last - torch.arange(steps)).clamp(min=0),
        "temperature": temperature,
        "choice_temperature": choice,
        "cond_scale": scale,
        "uniform": noise[:, 0],
        "gumbel": gumbel,
    }
    padded = {k: _padded(v[None], most, ONES.get(k, 0.0))[0] for k, v in by_step.items()}
    return {**padded, "order": order}
