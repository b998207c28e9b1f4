"""The sampler itself: a step over rows, and a loop over it (paper 2.7, 2.8).

It knows ids, hidden states and logits; no text, no images. Nothing inside the loop waits for the
host. Inpainting is the same loop on a canvas that is partly filled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..structures import SampleStep
from .choose import choose_tokens
from .contract import Denoiser, guided_hidden
from .options import SampleOptions, per_row
from .plan import SamplePlan, make_plan
from .policies import ORDERS, Policy, Score, score_of

Callback = Callable[[SampleStep], Any]
LOGITS = 2**26  # numbers, 256 MB: what a step holds at once of the logits of all its positions


@dataclass(frozen=True)
class SampleState:
    """Rows in the middle of sampling, each at a step of its own.

    Attributes:
        ids: tokens, ``mask_id`` where still masked.
        mask: True where still masked.
        step: how many of its steps each row has done.
        scores, log_probs: see `SampleStep`.
        hidden: every branch's output of the previous pass, for networks that read it.
    """

    ids: Int[Tensor, "B N"]
    mask: Bool[Tensor, "B N"]
    step: Int[Tensor, " B"]
    scores: Float[Tensor, "B N"]
    log_probs: Float[Tensor, "B N"]
    hidden: Float[Tensor, "G B N D"] | None = None

    @classmethod
    def start(cls, canvas: Int[Tensor, "B N"], mask_id: int) -> SampleState:
        """Before the first step."""
        zeros = torch.zeros(canvas.shape, dtype=torch.float32, device=canvas.device)
        step = torch.zeros(len(canvas), dtype=torch.long, device=canvas.device)
        return cls(canvas, canvas == mask_id, step, zeros, zeros)

    def rows(self, rows: slice | Tensor) -> SampleState:
        by_row = {n: v[rows] for n, v in vars(self).items() if v is not None and n != "hidden"}
        hidden = None if self.hidden is None else self.hidden[:, rows]
        return replace(self, **by_row, hidden=hidden)

    def put(self, rows: Tensor, other: SampleState) -> SampleState:
        """With another's rows in the place of some; without ``hidden``."""
        names = vars(self).keys() - {"hidden"}
        return replace(
            self,
            **{n: getattr(self, n).index_copy(0, rows, getattr(other, n)) for n in names},
        )

    def cat(self, other: SampleState) -> SampleState:
        """Another batch's rows after these."""
        names = vars(self).keys() - {"hidden"}
        joined = {n: torch.cat([getattr(self, n), getattr(other, n)]) for n in names}
        hidden = [self.hidden, other.hidden]
        given = next((h for h in hidden if h is not None), None)
        if given is not None:  # None stands for zeros
            rows = [len(self.ids), len(other.ids)]
            zeros = [given.new_zeros(len(given), n, *given.shape[2:]) for n in rows]
            hidden = [z if h is None else h for h, z in zip(hidden, zeros, strict=True)]
            given = torch.cat(hidden, dim=1)  # type: ignore[arg-type]
        return replace(self, **joined, hidden=given)


class Step(Protocol):
    """Something that can stand in for `step`: a compiled one, or one that changes the context.

    Its attribute ``by_row``, if there is one and it is true, says that it may be given some of the
    rows alone: rows that are done then leave the batch.
    """

    def __call__(
        self,
        state: SampleState,
        plan: SamplePlan,
        denoiser: Denoiser,
        *,
        guided: bool,
        num_logits: int | None,
    ) -> SampleState: ...


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
        guided: False if no row has guidance at its step: skips the second branch.
        num_logits: an upper bound of the masked tokens in any row; only that many get logits.
    """
    batch, num_tokens = state.ids.shape
    network = denoiser.network
    rows = torch.arange(batch, device=state.ids.device)
    now = state.step.clamp(max=plan.num_steps - 1)
    gumbel = plan.gumbel[rows, now]
    scale, left = plan.cond_scale[rows, now] if guided else None, plan.left[rows, now]

    # masked positions first, in their order; rows with fewer get some known ones, unused below
    order = state.mask.int().argsort(dim=1, descending=True, stable=True)
    at = order[:, : num_logits or num_tokens]
    if network.self_cond:  # the next pass reads the hidden states of all positions
        hidden, branches = denoiser.hidden(state.ids, scale, state.hidden, left=left)
        hidden = hidden[rows[:, None], at]
    else:
        hidden, branches = denoiser.hidden(state.ids, scale, at=at, left=left)
    policy = plan.policy or ("confidence" if denoiser.critic is None else "critic")
    scored = policy != "critic" and (callable(policy) or policy not in ORDERS)
    drawn, log_prob, score = _draw(
        denoiser,
        hidden,
        policy if scored else None,
        plan.uniform[rows, now].gather(1, at),
        plan.temperature[rows, now],
        *(plan.top_k, plan.top_p, plan.min_p),
    )

    def put(old: Tensor, new: Tensor) -> Tensor:
        return old.scatter(1, at, torch.where(state.mask.gather(1, at), new, old.gather(1, at)))

    ids, log_probs = put(state.ids, drawn), put(state.log_probs, log_prob)

    fixed = ~state.mask  # what was once decided stays
    if policy == "critic":
        judged, _ = guided_hidden(denoiser.critic, denoiser.critic_context, ids, scale)
        scores = denoiser.critic.to_logits(judged).squeeze(-1).float()
        fixed = plan.known  # a critic may take back its earlier decisions
    elif scored:
        scores = torch.zeros_like(log_probs).scatter(1, at, score)
    else:
        scores = -plan.order
    scores = scores + plan.choice_temperature[rows, now][:, None] * gumbel
    # ReMDM with exact counts: drawn without replacement, by exp(-probability when decided);
    # the noise of decided positions is free for it
    decided = ~(state.mask | plan.known)
    confidence = (state.log_probs.exp() - gumbel).masked_fill(~decided, torch.inf)
    again = _lowest(confidence, plan.num_remasked[rows, now])
    scores = scores.masked_fill(fixed, torch.inf).masked_fill(again, -torch.inf)
    mask = _lowest(scores, plan.num_masked[rows, now])
    running = (state.step < plan.num_steps)[:, None]
    return SampleState(
        ids=torch.where(running, ids.masked_fill(mask, network.mask_id), state.ids),
        mask=torch.where(running, mask, state.mask),
        step=state.step + 1,
        scores=scores,
        log_probs=torch.where(running, log_probs, state.log_probs),
        hidden=branches if network.self_cond else None,
    )


step.by_row = True  # type: ignore[attr-defined]
plain_step = step  # under a name that no argument hides


def _draw(
    denoiser: Denoiser,
    hidden: Float[Tensor, "r K D"],
    policy: Policy | Score | None,
    uniform: Float[Tensor, "B K"],
    temperature: Float[Tensor, " B"],
    *limits: Tensor | None,
) -> tuple[Int[Tensor, "B K"], Float[Tensor, "B K"], Float[Tensor, "B K"]]:
    """Tokens, their log-probabilities and the policy's scores, if it has any; from some positions'
    logits at a time. A policy that is a function of one's own sees all of them.
    """
    network = denoiser.network
    size = max(1, LOGITS // (len(uniform) * network.num_tokens))
    size = uniform.shape[1] if callable(policy) else size
    parts: list[tuple[Tensor, ...]] = []
    for some, points in zip(hidden.split(size, dim=1), uniform.split(size, dim=1), strict=True):
        logits = denoiser.spread(network.to_logits(some).float())
        ids, log_prob = choose_tokens(logits, temperature, points, *limits)
        score = log_prob if policy is None else score_of(policy, logits, log_prob)
        parts.append((ids, log_prob, score))
    ids, log_prob, score = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return ids, log_prob, score


def _lowest(scores: Float[Tensor, "B N"], count: Int[Tensor, " B"]) -> Bool[Tensor, "B N"]:
    """The positions of the ``count`` lowest scores of each row."""
    return scores.argsort(dim=1).argsort(dim=1) < count[:, None]


def sample_tokens(
    denoiser: Denoiser,
    canvas: Int[Tensor, "B N"],
    options: SampleOptions,
    callback: Callback | None = None,
    grid: tuple[int, int] | None = None,
    *,
    stream: str = "",
    step: Step = step,
) -> Int[Tensor, "B N"]:
    """Fill a canvas: token ids where known, ``mask_id`` where not.

    Args:
        denoiser: the model; its context must have two branches if any guidance scale is not 1.
        canvas: what is given.
        options: see `SampleOptions`.
        callback: called after each step; returning True stops there (masks may be left).
        grid: height and width of the tokens; a square by default.
        stream: which of the seeds' streams of random numbers to use (`stream_seed`).
        step: what advances the rows.

    Returns:
        ids; those given by the canvas are never changed.

    Raises:
        ValueError: options that do not fit the model or the batch.
    """
    network = denoiser.network
    if options.policy == "critic" and denoiser.critic is None:
        raise ValueError("policy 'critic' needs a model with a token critic: choose another")
    if options.policy is None and denoiser.critic is not None:
        options = options.replace(policy="critic")
    state = SampleState.start(canvas, network.mask_id)
    host_plan = make_plan(state.mask, options, grid, stream)
    if host_plan.top_k is not None and host_plan.top_k.max() > network.num_tokens:
        raise ValueError(
            f"top_k {host_plan.top_k.max()} is larger than the codebook's {network.num_tokens} "
            "codes"
        )
    asked = max(per_row(options.timesteps, len(canvas), "timesteps"))
    if asked > canvas.shape[1]:
        warnings.warn(
            f"timesteps {asked} exceed the {canvas.shape[1]} tokens of an image: "
            "sampling ends after one step per token",
            stacklevel=2,
        )
    plan = host_plan.to(canvas.device)
    guided = (host_plan.cond_scale != 1).any(dim=0).tolist()
    if network.self_cond:
        # each branch is conditioned on its own past, so it must be computed in every step
        guided = [any(guided)] * plan.num_steps
    left = torch.cat([(~host_plan.known).sum(1, keepdim=True), host_plan.num_masked], 1)
    # rows with the most steps first, so that those that are not done are always the first ones:
    # all that is sent to a device is sent before the first step
    counts = (left > 0).sum(dim=0).tolist()
    longest = (left > 0).sum(dim=1).argsort(descending=True, stable=True).to(canvas.device)
    leave = getattr(step, "by_row", False) and not network.self_cond
    # those that are not done, and the model's and the plan's view of them
    rows, part, some = longest, denoiser, plan
    for i, (is_guided, num_logits) in enumerate(
        zip(guided, left.amax(0).tolist()[:-1], strict=True)
    ):
        if num_logits == 0:
            break
        how: dict[str, Any] = dict(guided=is_guided, num_logits=num_logits)
        if counts[i] == len(canvas) or not leave:
            model = denoiser
            if i == 0 and step is plain_step and not network.self_cond:
                # at first, pictures of one prompt differ in nothing but their noise
                model = denoiser.once(canvas, plan.cond_scale[:, 0], plan.left[:, 0])
            state = step(state, plan, model, **how)
        else:
            if counts[i] < len(rows):
                rows = longest[: counts[i]].sort().values
                part, some = denoiser.rows(rows), plan.rows(rows)
            state = state.put(rows, step(state.rows(rows), some, part, **how))
        seen = SampleStep(i + 1, state.ids, state.mask, state.scores, state.log_probs)
        if callback and callback(seen):
            break
    return state.ids
