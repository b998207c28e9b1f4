"""The sampler: a plan, policies, a step over rows, and a loop (paper 2.7, 2.8).

It knows ids, hidden states and logits; no text, no images. Everything that varies is fixed in the
plan before the loop, one row per image, so that a row's result depends on its own seed and
settings alone, rows at different steps may share a batch, and nothing inside the loop waits for
the host. Inpainting is the same loop on a canvas that is partly filled.

A policy that judges tokens is a function in `SCORES`; one that fixes the order beforehand is a
function in `ORDERS`. A new one is a few lines there, and its name in `structures.Policy`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .masking import mask_ratio, read_table
from .structures import GuidanceSchedule, Policy, SampleOptions, SampleStep, Schedule

T = TypeVar("T")


@dataclass(frozen=True)
class SamplePlan:
    """What each row does at each of its own steps; S is the most steps of any row.

    Attributes:
        num_masked: tokens still masked after each step.
        num_remasked: how many of them had been decided before.
        temperature: of the token choice, at each step.
        choice_temperature: scale of the noise on the scores, at each step.
        cond_scale: guidance at each step.
        lowres_scale: guidance by the low-resolution image at each step.
        uniform: noise of the token choice, one number per position.
        gumbel: noise of the order of the positions.
        order: each position's turn, for policies that fix it beforehand.
        known: tokens given by the canvas, which never change.
        top_k, top_p, min_p: limits of the token choice; None where no row has any.
        policy: see `SampleOptions`.
    """

    num_masked: Int[Tensor, "B S"]
    num_remasked: Int[Tensor, "B S"]
    temperature: Float[Tensor, "B S"]
    choice_temperature: Float[Tensor, "B S"]
    cond_scale: Float[Tensor, "B S"]
    lowres_scale: Float[Tensor, "B S"]
    uniform: Float[Tensor, "B S N"]
    gumbel: Float[Tensor, "B S N"]
    order: Float[Tensor, "B N"]
    known: Bool[Tensor, "B N"]
    top_k: Int[Tensor, " B"] | None = None
    top_p: Float[Tensor, " B"] | None = None
    min_p: Float[Tensor, " B"] | None = None
    policy: Policy | None = None

    @property
    def num_steps(self) -> int:
        return self.num_masked.shape[1]

    def to(self, device: torch.device) -> SamplePlan:
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class SampleState:
    """Rows in the middle of sampling, each at a step of its own."""

    ids: Int[Tensor, "B N"]
    mask: Bool[Tensor, "B N"]
    step: Int[Tensor, " B"]
    scores: Float[Tensor, "B N"]
    log_probs: Float[Tensor, "B N"]
    self_cond: Float[Tensor, "G N D"] | None = None


@dataclass(frozen=True)
class Denoiser:
    """A transformer with its context, and a critic with its own, if any.

    Rows 0 to B-1 of a context are conditional. Where there is guidance, rows B to 2B-1 are the
    same images without text or with the negative prompt, and where the low-resolution image has
    guidance of its own, rows 2B to 3B-1 have neither text nor low-resolution image.
    """

    transformer: Any
    context: Any
    critic: Any = None
    critic_context: Any = None

    def hidden(
        self,
        ids: Int[Tensor, "B N"],
        scale: Float[Tensor, " B"],
        lowres_scale: Float[Tensor, " B"],
        guided: bool,
        self_cond: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "G N D"]]:
        """Guided hidden states, and those of each branch for self-conditioning."""
        extra = () if self_cond is None else (self_cond,)
        return _guide(self.transformer, self.context, ids, scale, lowres_scale, guided, *extra)

    def critic_scores(
        self,
        ids: Int[Tensor, "B N"],
        scale: Float[Tensor, " B"],
        lowres_scale: Float[Tensor, " B"],
        guided: bool,
    ) -> Float[Tensor, "B N"]:
        hidden, _ = _guide(self.critic, self.critic_context, ids, scale, lowres_scale, guided)
        return self.critic.to_logits(hidden).squeeze(-1).float()


def _guide(model, context, ids, scale, lowres_scale, guided, *extra):
    """``u + scale * (c - u)`` on hidden states: the bias-free head makes it the same on logits.

    With a third branch ``z + lowres_scale * (u - z) + scale * (c - u)``, rearranged so that a
    ``lowres_scale`` of 1 adds exactly nothing.
    """
    if not guided:
        hidden = model(ids, context.rows(slice(len(ids))), *extra)
        return hidden, hidden
    branches = len(context.mask) // len(ids)
    every = model(ids.repeat(branches, 1), context, *extra)
    c, u, *z = every.chunk(branches)
    hidden = torch.lerp(u, c, scale[:, None, None].to(u.dtype))  # exactly c at scale 1
    if z:
        hidden = hidden + (lowres_scale[:, None, None].to(u.dtype) - 1) * (u - z[0])
    return hidden, every


# Policies: which positions to keep ------------------------------------------------------------


def confidence(
    logits: Float[Tensor, "B K V"], log_prob: Float[Tensor, "B K"]
) -> Float[Tensor, "B K"]:
    """Log-probability of the token drawn (MaskGIT, Chang et al. 2022)."""
    return log_prob


def margin(logits: Float[Tensor, "B K V"], log_prob: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """log(p1 - p2) of the two likeliest tokens (Kim et al. 2025); the log suits Gumbel noise."""
    first, second = logits.softmax(dim=-1).topk(2).values.unbind(-1)
    return (first - second).clamp(min=torch.finfo(first.dtype).tiny).log()


def entropy(logits: Float[Tensor, "B K V"], log_prob: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Minus the entropy of the token's distribution, in nats."""
    return -torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


SCORES: dict[Policy, Callable[[Tensor, Tensor], Tensor]] = {
    "confidence": confidence,
    "margin": margin,
    "entropy": entropy,
}


def random_order(noise: Float[Tensor, " N"], grid: tuple[int, int]) -> Int[Tensor, " N"]:
    return noise.argsort().argsort()


def rolled_halton(noise: Float[Tensor, " N"], grid: tuple[int, int]) -> Int[Tensor, " N"]:
    """`halton_order`, begun at the cell that the noise chooses, around the edges of the grid."""
    row, column = divmod(int(noise.argmax()), grid[1])
    return halton_order(*grid).roll((row, column), (0, 1)).flatten()


ORDERS: dict[Policy, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "halton": rolled_halton,
    "random": random_order,
}


@lru_cache
def halton_order(height: int, width: int) -> Int[Tensor, "h w"]:
    """Turn, from 0, of each cell of a grid: when the 2-D Halton sequence first falls into it.

    Rows follow the sequence of base 2, columns that of base 3, so that any first cells are spread
    evenly (Besnier et al. 2025, Halton Scheduler for Masked Generative Image Transformer).
    """
    cells, points = height * width, 4 * height * width
    while True:
        index = torch.arange(points)
        cell = _halton(index, 2, height) * width + _halton(index, 3, width)
        first = torch.full((cells,), points).scatter_reduce(0, cell, index, "amin")
        if first.max() < points:  # every cell was met
            return first.argsort().argsort().view(height, width)
        points *= 2


def _halton(index: Tensor, base: int, size: int) -> Tensor:
    """floor(size * radical inverse of the index), in whole numbers, so exactly."""
    mirrored, scale = torch.zeros_like(index), 1
    while scale < len(index):
        mirrored = mirrored * base + index % base
        index, scale = index // base, scale * base
    return mirrored * size // scale


# The plan -------------------------------------------------------------------------------------


def masked_counts(
    num_masked: int, timesteps: int, schedule: Schedule | Sequence[float] = "cosine"
) -> list[int]:
    """How many of ``num_masked`` tokens are still masked after each step; the last is 0.

    floor(n * ratio(i / timesteps)), and at least one token is decided in every step. With fewer
    tokens than steps, the row is done early.
    """
    steps = min(timesteps, num_masked)
    u = torch.arange(1, steps + 1, dtype=torch.float64) / max(steps, 1)
    counts, before = [], num_masked
    for i, wanted in enumerate((mask_ratio(u, schedule) * num_masked).floor().int().tolist(), 1):
        before = max(min(wanted, before - 1), steps - i)
        counts.append(before)
    return counts + [0] * (timesteps - steps)


def per_row(value: T | Sequence[T], batch: int, name: str) -> list[T]:
    """One value for all rows, or one for each."""
    if isinstance(value, (Sequence, Tensor)) and not isinstance(value, str):
        if len(value) != batch:
            raise ValueError(f"{name} has {len(value)} values for {batch} images")
        return list(value)
    return [value] * batch  # type: ignore[list-item]


def row_seeds(seeds: int | Sequence[int], batch: int) -> list[int]:
    """One seed for each row: those given, or s, s + 1, ...

    Raises:
        ValueError: another number of them, or what is no whole number of at most 64 bits.
    """
    if isinstance(seeds, Integral):
        seeds = range(int(seeds), int(seeds) + batch)
    given = per_row(seeds, batch, "seeds")
    if not all(isinstance(seed, Integral) and -(2**63) <= seed < 2**64 for seed in given):
        raise ValueError(f"seeds must be whole numbers of at most 64 bits, not {given}")
    return [int(seed) for seed in given]


def guidance_share(
    progress: Float[Tensor, " S"],
    schedule: GuidanceSchedule | Sequence[float],
    start: float,
    end: float,
) -> Float[Tensor, " S"]:
    """The share of the guidance at each step; see `SampleOptions`."""
    if not isinstance(schedule, str):
        return read_table(schedule, progress)
    if schedule == "linear":
        return progress
    if schedule == "cosine":
        return (1 - torch.cos(math.pi * progress)) / 2
    if schedule == "interval":
        if start > end:
            raise ValueError(f"guidance_start {start} is after guidance_end {end}: swap them")
        return ((progress >= start) & (progress <= end)).float()
    return torch.ones_like(progress)


def make_plan(
    mask: Bool[Tensor, "B N"], options: SampleOptions, grid: tuple[int, int] | None = None
) -> SamplePlan:
    """Fix everything that sampling will need, on the CPU.

    Noise comes from one generator per row, on the CPU: one seed gives one noise on every device.

    Args:
        mask: what the canvas leaves open.
        options: see `SampleOptions`.
        grid: height and width of the tokens, for Halton order; a square by default.

    Raises:
        ValueError: a number of values or seeds that is not the number of rows; a grid that has
            not N cells.
    """
    batch, num_tokens = mask.shape
    mask = mask.cpu()

    def rows(name: str) -> list:
        return per_row(getattr(options, name), batch, name)

    def limit(name: str, off: float, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """None where no row is limited: the token choice is then spared the work."""
        values = rows(name)
        return None if all(v == off for v in values) else torch.tensor(values, dtype=dtype)

    timesteps, temperature = rows("timesteps"), rows("temperature")
    end = temperature if options.temperature_end is None else rows("temperature_end")
    choice, remask = rows("choice_temperature"), rows("remask")
    scale, lowres_scale = rows("cond_scale"), rows("lowres_scale")
    bounds = list(zip(rows("guidance_start"), rows("guidance_end"), strict=True))
    seeds = options.seeds
    if seeds is None:
        seeds = torch.randint(2**62, (batch,)).tolist()
    seeds = row_seeds(seeds, batch)
    grid = grid or (math.isqrt(num_tokens), math.isqrt(num_tokens))
    if options.policy == "halton" and grid[0] * grid[1] != num_tokens:
        raise ValueError(f"policy 'halton' needs the grid of {num_tokens} tokens, not {grid}")

    most = max(timesteps, default=1)
    plan = SamplePlan(
        num_masked=torch.zeros(batch, most, dtype=torch.long),
        num_remasked=torch.zeros(batch, most, dtype=torch.long),
        temperature=torch.ones(batch, most),
        choice_temperature=torch.zeros(batch, most),
        cond_scale=torch.ones(batch, most),
        lowres_scale=torch.ones(batch, most),
        uniform=torch.zeros(batch, most, num_tokens),
        gumbel=torch.zeros(batch, most, num_tokens),
        order=torch.zeros(batch, num_tokens),
        known=~mask,
        top_k=limit("top_k", 0, torch.long),
        top_p=limit("top_p", 1),
        min_p=limit("min_p", 0),
        policy=options.policy,
    )
    for row, steps in enumerate(timesteps):
        open_tokens = int(mask[row].sum())
        counts = torch.tensor(masked_counts(open_tokens, steps, options.noise_schedule))
        plan.num_masked[row, :steps] = counts
        # ReMDM's largest probability, min(1, masked after / decided before), gives so many
        decided = open_tokens - torch.cat([torch.tensor([open_tokens]), counts[:-1]])
        plan.num_remasked[row, :steps] = (torch.minimum(decided, counts) * remask[row]).long()

        last = min(steps, open_tokens) - 1  # the ramps end where the row does
        done = (torch.arange(steps) / last).clamp(max=1) if last > 0 else torch.ones(steps)
        plan.temperature[row, :steps] = temperature[row] + (end[row] - temperature[row]) * done
        if options.policy not in ORDERS:
            plan.choice_temperature[row, :steps] = choice[row] * (1 - done)
        share = guidance_share(done, options.guidance_schedule, *bounds[row])
        plan.cond_scale[row, :steps] = 1 + (scale[row] - 1) * share
        plan.lowres_scale[row, :steps] = 1 + (lowres_scale[row] - 1) * share

        generator = torch.Generator().manual_seed(int(seeds[row]))
        noise = torch.rand(steps, 2, num_tokens, generator=generator)
        plan.uniform[row, :steps] = noise[:, 0]
        plan.gumbel[row, :steps] = -torch.log(-torch.log(noise[:, 1].clamp(1e-9, 1 - 1e-7)))
        if options.policy in ORDERS:
            plan.order[row] = ORDERS[options.policy](plan.gumbel[row, 0], grid).float()
    return plan


def choose_tokens(
    logits: Float[Tensor, "B K V"],
    temperature: Float[Tensor, " B"],
    uniform: Float[Tensor, "B K"],
    top_k: Int[Tensor, " B"] | None = None,
    top_p: Float[Tensor, " B"] | None = None,
    min_p: Float[Tensor, " B"] | None = None,
) -> tuple[Int[Tensor, "B K"], Float[Tensor, "B K"]]:
    """Draw from softmax(logits / temperature) by inverse CDF, in float32.

    ``top_k`` (0: off), ``top_p`` and ``min_p`` are each read on that distribution, and a token
    must pass all of them; the likeliest always does.

    Returns:
        ids, and their log-probabilities at temperature 1, of all tokens.
    """
    logits = logits.float()
    greedy = (temperature == 0)[:, None]
    divisor = torch.where(greedy, 1.0, temperature[:, None]).clamp(min=1e-30).unsqueeze(-1)
    # the largest first: tiny temperatures would make it infinite
    probs = ((logits - logits.amax(dim=-1, keepdim=True)) / divisor).softmax(dim=-1)
    if top_k is not None or top_p is not None:
        probs = probs * _likeliest(probs, top_k, top_p)
    if min_p is not None:
        probs = probs * (probs >= min_p[:, None, None] * probs.amax(dim=-1, keepdim=True))
    cdf = probs.cumsum(dim=-1)
    point = (uniform * cdf[..., -1]).unsqueeze(-1)
    drawn = torch.searchsorted(cdf, point, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    ids = torch.where(greedy, logits.argmax(dim=-1), drawn)
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return ids, chosen - logits.logsumexp(dim=-1)


def _likeliest(probs: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Which tokens are among the k likeliest, and needed to make up the probability p.

    Of equal ones, the first in the codebook.
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
    """Sorted along the last axis, the greatest first."""
    if values.device.type != "cpu":
        return values.sort(dim=-1, descending=True).values
    # NumPy sorts with SIMD; thirty times as fast on 4,096 codes
    return torch.from_numpy(np.sort(values.detach().numpy(), axis=-1)).flip(-1)


def _lowest(scores: Float[Tensor, "B N"], count: Int[Tensor, " B"]) -> Bool[Tensor, "B N"]:
    """The positions of the ``count`` lowest scores of each row."""
    return scores.argsort(dim=1).argsort(dim=1) < count[:, None]


@torch.no_grad()
def step(
    state: SampleState,
    plan: SamplePlan,
    denoiser: Denoiser,
    *,
    guided: bool = True,
    num_logits: int | None = None,
) -> SampleState:
    """Advance every row by one of its own steps; a finished row stays as it is.

    Args:
        state: the rows.
        plan: on the same device.
        denoiser: the model.
        guided: False where no row needs guidance at its step: spares the second half.
        num_logits: an upper bound of the masked tokens in any row; only so many get logits.
    """
    batch, num_tokens = state.ids.shape
    mask_id = denoiser.transformer.mask_id
    rows = torch.arange(batch, device=state.ids.device)
    now = state.step.clamp(max=plan.num_steps - 1)
    gumbel, scale, lowres = (
        x[rows, now] for x in (plan.gumbel, plan.cond_scale, plan.lowres_scale)
    )

    hidden, self_cond = denoiser.hidden(state.ids, scale, lowres, guided, state.self_cond)
    # masked positions first, in their order; rows with fewer get some known ones, unused below
    order = state.mask.int().argsort(dim=1, descending=True, stable=True)
    at = order[:, : num_logits or num_tokens]
    logits = denoiser.transformer.to_logits(hidden[rows[:, None], at]).float()
    uniform = plan.uniform[rows, now].gather(1, at)
    limits = (plan.top_k, plan.top_p, plan.min_p)
    drawn, log_prob = choose_tokens(logits, plan.temperature[rows, now], uniform, *limits)

    def put(old: Tensor, new: Tensor) -> Tensor:
        return old.scatter(1, at, torch.where(state.mask.gather(1, at), new, old.gather(1, at)))

    ids, log_probs = put(state.ids, drawn), put(state.log_probs, log_prob)

    policy = plan.policy or ("confidence" if denoiser.critic is None else "critic")
    fixed = ~state.mask  # what was once decided stays
    if policy == "critic":
        scores = denoiser.critic_scores(ids, scale, lowres, guided)
        fixed = plan.known  # a critic may take back its earlier decisions
    elif policy in ORDERS:
        scores = -plan.order
    else:
        scores = torch.zeros_like(log_probs).scatter(1, at, SCORES[policy](logits, log_prob))
    scores = scores + plan.choice_temperature[rows, now][:, None] * gumbel
    # ReMDM with exact counts: drawn without replacement, by exp(-probability when decided);
    # the noise of decided positions is free for it
    decided = ~(state.mask | plan.known)
    sure = (state.log_probs.exp() - gumbel).masked_fill(~decided, torch.inf)
    again = _lowest(sure, plan.num_remasked[rows, now])
    scores = scores.masked_fill(fixed, torch.inf).masked_fill(again, -torch.inf)
    mask = _lowest(scores, plan.num_masked[rows, now])
    running = (state.step < plan.num_steps)[:, None]
    return SampleState(
        ids=torch.where(running, ids.masked_fill(mask, mask_id), state.ids),
        mask=torch.where(running, mask, state.mask),
        step=state.step + 1,
        scores=scores,
        log_probs=torch.where(running, log_probs, state.log_probs),
        self_cond=self_cond if state.self_cond is not None else None,
    )


def sample_tokens(
    denoiser: Denoiser,
    canvas: Int[Tensor, "B N"],
    options: SampleOptions,
    callback: Callable[[SampleStep], Any] | None = None,
    grid: tuple[int, int] | None = None,
) -> Int[Tensor, "B N"]:
    """Fill a canvas: token ids where known, ``mask_id`` where not.

    Args:
        denoiser: the model; its context must have 2B rows if any guidance scale is not 1, 3B if
            any ``lowres_scale`` is not.
        canvas: what is given.
        options: see `SampleOptions`.
        callback: called after each step; returning True stops there (masks may be left).
        grid: height and width of the tokens; a square by default.

    Returns:
        ids; those of the canvas are never changed.

    Raises:
        ValueError: options that do not fit the model or the batch.
    """
    transformer = denoiser.transformer
    if options.policy == "critic" and denoiser.critic is None:
        raise ValueError("policy 'critic' needs a model with a token critic: choose another")
    mask = canvas == transformer.mask_id
    host_plan = make_plan(mask, options, grid)
    if host_plan.top_k is not None and host_plan.top_k.max() > transformer.num_tokens:
        raise ValueError(
            f"top_k {host_plan.top_k.max()} is over the codebook's {transformer.num_tokens} codes"
        )
    if host_plan.num_steps > canvas.shape[1]:
        warnings.warn(
            f"timesteps {host_plan.num_steps} are more than the {canvas.shape[1]} tokens of an "
            "image: it is done after one step for each",
            stacklevel=2,
        )
    plan = host_plan.to(canvas.device)
    guided = (host_plan.cond_scale != 1) | (host_plan.lowres_scale != 1)
    guided = guided.any(dim=0).tolist()
    self_cond = None
    if transformer.self_cond:
        # each branch is conditioned on its own past, so it must be computed in every step
        guided = [any(guided)] * plan.num_steps
        rows = len(denoiser.context.mask) if any(guided) else len(canvas)
        self_cond = torch.zeros(rows, canvas.shape[1], transformer.dim, device=canvas.device)
    most = torch.cat([mask.sum(1, keepdim=True).cpu(), host_plan.num_masked], 1).amax(0).tolist()

    state = SampleState(
        ids=canvas,
        mask=mask,
        step=torch.zeros(len(canvas), dtype=torch.long, device=canvas.device),
        scores=torch.zeros(canvas.shape, device=canvas.device),
        log_probs=torch.zeros(canvas.shape, device=canvas.device),
        self_cond=self_cond,
    )
    for i in range(plan.num_steps):
        if most[i] == 0:
            break
        state = step(state, plan, denoiser, guided=guided[i], num_logits=most[i])
        seen = SampleStep(i + 1, state.ids, state.mask, state.scores, state.log_probs)
        if callback and callback(seen):
            break
    return state.ids
