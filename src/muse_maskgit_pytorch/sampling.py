"""The sampler: a plan, a step over rows, and a loop (paper 2.7, 2.8).

It knows ids, hidden states and logits; no text, no images. Everything that varies is fixed in the
plan before the loop, one row per image, so that a row's result depends on its own seed and
settings alone, rows at different steps may share a batch, and nothing inside the loop waits for
the host. Inpainting is the same loop on a canvas that is partly filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .masking import mask_ratio
from .structures import SampleOptions, SampleStep, Schedule

T = TypeVar("T")


@dataclass(frozen=True)
class SamplePlan:
    """What each row does at each of its own steps; S is the most steps of any row.

    Attributes:
        num_masked: tokens still masked after each step.
        temperature: of the token choice.
        choice_temperature: scale of the noise on the confidence, at each step.
        cond_scale: guidance at each step.
        uniform: noise of the token choice, one number per position.
        gumbel: noise of the order of the positions.
        known: tokens given by the canvas, which never change.
    """

    num_masked: Int[Tensor, "B S"]
    temperature: Float[Tensor, " B"]
    choice_temperature: Float[Tensor, "B S"]
    cond_scale: Float[Tensor, "B S"]
    uniform: Float[Tensor, "B S N"]
    gumbel: Float[Tensor, "B S N"]
    known: Bool[Tensor, "B N"]

    @property
    def num_steps(self) -> int:
        return self.num_masked.shape[1]

    def to(self, device: torch.device) -> SamplePlan:
        return SamplePlan(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class SampleState:
    """Rows in the middle of sampling, each at a step of its own."""

    ids: Int[Tensor, "B N"]
    mask: Bool[Tensor, "B N"]
    step: Int[Tensor, " B"]
    scores: Float[Tensor, "B N"]
    self_cond: Float[Tensor, "G N D"] | None = None


@dataclass(frozen=True)
class Denoiser:
    """A transformer with its context, and a critic with its own, if any.

    Rows 0 to B-1 of a context are conditional. Where there is guidance, rows B to 2B-1 are the
    same images without text or with the negative prompt.
    """

    transformer: Any
    context: Any
    critic: Any = None
    critic_context: Any = None

    def hidden(
        self,
        ids: Int[Tensor, "B N"],
        scale: Float[Tensor, " B"],
        guided: bool,
        self_cond: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "G N D"]]:
        """Guided hidden states, and those of each branch for self-conditioning."""
        extra = () if self_cond is None else (self_cond,)
        return _guide(self.transformer, self.context, ids, scale, guided, *extra)

    def critic_scores(
        self, ids: Int[Tensor, "B N"], scale: Float[Tensor, " B"], guided: bool
    ) -> Float[Tensor, "B N"]:
        hidden, _ = _guide(self.critic, self.critic_context, ids, scale, guided)
        return self.critic.to_logits(hidden).squeeze(-1).float()


def _guide(model, context, ids, scale, guided, *extra):
    """``u + scale * (c - u)`` on hidden states: the bias-free head makes it the same on logits."""
    if not guided:
        hidden = model(ids, context.rows(slice(len(ids))), *extra)
        return hidden, hidden
    both = model(torch.cat([ids, ids]), context, *extra)
    c, u = both.chunk(2)
    return torch.lerp(u, c, scale[:, None, None].to(u.dtype)), both  # exactly c at scale 1


def masked_counts(num_masked: int, timesteps: int, schedule: Schedule = "cosine") -> list[int]:
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


def make_plan(mask: Bool[Tensor, "B N"], options: SampleOptions) -> SamplePlan:
    """Fix everything that sampling will need, on the CPU.

    Noise comes from one generator per row, on the CPU: one seed gives one noise on every device.

    Args:
        mask: what the canvas leaves open.
        options: see `SampleOptions`.

    Raises:
        ValueError: a number of values or seeds that is not the number of rows.
    """
    batch, num_tokens = mask.shape
    mask = mask.cpu()
    timesteps = per_row(options.timesteps, batch, "timesteps")
    temperature = per_row(options.temperature, batch, "temperature")
    choice = per_row(options.choice_temperature, batch, "choice_temperature")
    scale = per_row(options.cond_scale, batch, "cond_scale")
    seeds = options.seeds
    if seeds is None:
        seeds = torch.randint(2**62, (batch,)).tolist()
    elif isinstance(seeds, int):
        seeds = range(seeds, seeds + batch)
    seeds = per_row(seeds, batch, "seeds")

    most = max(timesteps, default=1)
    plan = SamplePlan(
        num_masked=torch.zeros(batch, most, dtype=torch.long),
        temperature=torch.tensor(temperature, dtype=torch.float32),
        choice_temperature=torch.zeros(batch, most),
        cond_scale=torch.ones(batch, most),
        uniform=torch.zeros(batch, most, num_tokens),
        gumbel=torch.zeros(batch, most, num_tokens),
        known=~mask,
    )
    for row, steps in enumerate(timesteps):
        open_tokens = int(mask[row].sum())
        counts = masked_counts(open_tokens, steps, options.noise_schedule)
        plan.num_masked[row, :steps] = torch.tensor(counts)
        last = min(steps, open_tokens) - 1  # the ramps end where the row does
        done = (torch.arange(steps) / last).clamp(max=1) if last > 0 else torch.ones(steps)
        plan.choice_temperature[row, :steps] = choice[row] * (1 - done)
        ramp = done if options.guidance_schedule == "linear" else torch.ones(steps)
        plan.cond_scale[row, :steps] = 1 + (scale[row] - 1) * ramp
        generator = torch.Generator().manual_seed(int(seeds[row]))
        noise = torch.rand(steps, 2, num_tokens, generator=generator)
        plan.uniform[row, :steps] = noise[:, 0]
        plan.gumbel[row, :steps] = -torch.log(-torch.log(noise[:, 1].clamp(1e-9, 1 - 1e-7)))
    return plan


def choose_tokens(
    logits: Float[Tensor, "B K V"],
    temperature: Float[Tensor, " B"],
    uniform: Float[Tensor, "B K"],
) -> tuple[Int[Tensor, "B K"], Float[Tensor, "B K"]]:
    """Draw from softmax(logits / temperature) by inverse CDF, in float32.

    Returns:
        ids, and their log-probabilities at temperature 1.
    """
    logits = logits.float()
    greedy = (temperature == 0)[:, None]
    divisor = torch.where(greedy, 1.0, temperature[:, None]).unsqueeze(-1)
    cdf = (logits / divisor).softmax(dim=-1).cumsum(dim=-1)
    point = (uniform * cdf[..., -1]).unsqueeze(-1)
    drawn = torch.searchsorted(cdf, point, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
    ids = torch.where(greedy, logits.argmax(dim=-1), drawn)
    chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return ids, chosen - logits.logsumexp(dim=-1)


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
    scale, noise_scale = plan.cond_scale[rows, now], plan.choice_temperature[rows, now]

    hidden, self_cond = denoiser.hidden(state.ids, scale, guided, state.self_cond)
    # masked positions first, in their order; rows with fewer get some known ones, unused below
    order = state.mask.int().argsort(dim=1, descending=True, stable=True)
    at = order[:, : num_logits or num_tokens]
    logits = denoiser.transformer.to_logits(hidden[rows[:, None], at])
    drawn, log_prob = choose_tokens(logits, plan.temperature, plan.uniform[rows, now].gather(1, at))
    drawn = torch.where(state.mask.gather(1, at), drawn, state.ids.gather(1, at))
    ids = state.ids.scatter(1, at, drawn)

    if denoiser.critic is None:
        scores = torch.zeros_like(state.scores).scatter(1, at, log_prob)
        fixed = ~state.mask  # what was once decided stays
    else:
        scores = denoiser.critic_scores(ids, scale, guided)
        fixed = plan.known  # a critic may take back its earlier decisions
    scores = scores + noise_scale[:, None] * plan.gumbel[rows, now]
    scores = scores.masked_fill(fixed, torch.inf)
    rank = scores.argsort(dim=1).argsort(dim=1)
    mask = rank < plan.num_masked[rows, now][:, None]
    running = (state.step < plan.num_steps)[:, None]
    return SampleState(
        ids=torch.where(running, ids.masked_fill(mask, mask_id), state.ids),
        mask=torch.where(running, mask, state.mask),
        step=state.step + 1,
        scores=scores,
        self_cond=self_cond if state.self_cond is not None else None,
    )


def sample_tokens(
    denoiser: Denoiser,
    canvas: Int[Tensor, "B N"],
    options: SampleOptions,
    callback: Callable[[SampleStep], Any] | None = None,
) -> Int[Tensor, "B N"]:
    """Fill a canvas: token ids where known, ``mask_id`` where not.

    Args:
        denoiser: the model; its context must have 2B rows if any guidance scale is not 1.
        canvas: what is given.
        options: see `SampleOptions`.
        callback: called after each step; returning True stops there (masks may be left).

    Returns:
        ids; those of the canvas are never changed.
    """
    transformer = denoiser.transformer
    mask = canvas == transformer.mask_id
    host_plan = make_plan(mask, options)
    plan = host_plan.to(canvas.device)
    guided = (host_plan.cond_scale != 1).any(dim=0).tolist()
    self_cond = None
    if transformer.self_cond:
        # each branch is conditioned on its own past, so it must be computed in every step
        guided = [any(guided)] * plan.num_steps
        rows = len(canvas) * (1 + any(guided))
        self_cond = torch.zeros(rows, canvas.shape[1], transformer.dim, device=canvas.device)
    most = torch.cat([mask.sum(1, keepdim=True).cpu(), host_plan.num_masked], 1).amax(0).tolist()
    if denoiser.critic is not None:
        most = [canvas.shape[1]] * len(most)

    state = SampleState(
        ids=canvas,
        mask=mask,
        step=torch.zeros(len(canvas), dtype=torch.long, device=canvas.device),
        scores=torch.zeros(canvas.shape, device=canvas.device),
        self_cond=self_cond,
    )
    for i in range(plan.num_steps):
        if most[i] == 0:
            break
        state = step(state, plan, denoiser, guided=guided[i], num_logits=most[i])
        if callback and callback(SampleStep(i + 1, state.ids, state.mask, state.scores)):
            break
    return state.ids
