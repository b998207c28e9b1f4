"""The sampler itself: a step over rows, and what goes on step by step (paper 2.7, 2.8).

It knows ids, hidden states and logits; no text, no images. Nothing inside the loop waits for the
host. Inpainting is the same loop on a canvas that is partly filled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..structures import SampleStep
from .choose import choose_tokens
from .contract import Denoiser, guided_hidden
from .options import SampleOptions, per_row
from .plan import SamplePlan, make_plan
from .policies import ORDERS, score_of

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

    def cat(self, other: SampleState, branches: int = 1) -> SampleState:
        """Another batch's rows after these, with hidden states of at least so many branches."""
        names = vars(self).keys() - {"hidden"}
        joined = {n: torch.cat([getattr(self, n), getattr(other, n)]) for n in names}
        hidden = [self.hidden, other.hidden]
        given = [h for h in hidden if h is not None]
        if not given:
            return replace(self, **joined)
        most = max(branches, *map(len, given))
        written = []  # None stands for zeros, and rows without guidance need no second branch
        for h, rows in zip(hidden, (len(self.ids), len(other.ids)), strict=True):
            if h is None:
                h = given[0].new_zeros(1, rows, *given[0].shape[2:])
            written.append(torch.cat([h, *[h[:1]] * (most - len(h))]))
        return replace(self, **joined, hidden=torch.cat(written, dim=1))


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
    default = "confidence" if denoiser.critic is None else "critic"
    policies: list[Any] = [policy or default for policy in plan.policies]
    judging = [p for p in dict.fromkeys(policies) if callable(p) or p not in (*ORDERS, "critic")]
    drawn, log_prob, scored = _draw(
        denoiser,
        hidden,
        judging,
        plan.uniform[rows, now].gather(1, at),
        plan.temperature[rows, now],
        *(plan.top_k, plan.top_p, plan.min_p),
    )

    def put(old: Tensor, new: Tensor) -> Tensor:
        return old.scatter(1, at, torch.where(state.mask.gather(1, at), new, old.gather(1, at)))

    ids, log_probs = put(state.ids, drawn), put(state.log_probs, log_prob)

    fixed = ~state.mask  # what was once decided stays
    scores = torch.zeros_like(log_probs)
    for place, policy in enumerate(policies):
        if policy == "critic":
            critic: Any = denoiser.critic
            judged, _ = guided_hidden(critic, denoiser.critic_context, ids, scale)
            own = critic.to_logits(judged).squeeze(-1).float()
            fixed = plan.known  # a critic may take back its earlier decisions
        elif policy in scored:
            own = torch.zeros_like(log_probs).scatter(1, at, scored[policy])
        else:
            own = -plan.order
        # rows of several policies: each takes what its own says
        mine = None if plan.which is None else (plan.which == place)[:, None]
        scores = own if mine is None else torch.where(mine, own, scores)
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
    policies: Sequence[Any],
    uniform: Float[Tensor, "B K"],
    temperature: Float[Tensor, " B"],
    *limits: Tensor | None,
) -> tuple[Int[Tensor, "B K"], Float[Tensor, "B K"], dict[Any, Tensor]]:
    """Tokens, their log-probabilities and what each policy scores them (B, K); from some positions'
    logits at a time. A policy that is a function of one's own sees all of them.
    """
    network = denoiser.network
    size = max(1, LOGITS // (len(uniform) * network.num_tokens))
    size = uniform.shape[1] if any(map(callable, policies)) else size
    parts: list[tuple[Tensor, ...]] = []
    for some, points in zip(hidden.split(size, dim=1), uniform.split(size, dim=1), strict=True):
        logits = denoiser.spread(network.to_logits(some).float())
        ids, log_prob = choose_tokens(logits, temperature, points, *limits)
        scores = (score_of(policy, logits, log_prob) for policy in policies)
        parts.append((ids, log_prob, *scores))
    ids, log_prob, *scores = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return ids, log_prob, dict(zip(policies, scores, strict=True))


def _lowest(scores: Float[Tensor, "B N"], count: Int[Tensor, " B"]) -> Bool[Tensor, "B N"]:
    """The positions of the ``count`` lowest scores of each row."""
    return scores.argsort(dim=1).argsort(dim=1) < count[:, None]


class Sampling:
    """Rows on their way from masks to tokens, each at a step of its own.

    `sample_tokens` takes one from its start to its end. A server joins several between two steps
    (`cat`), and takes out those that are done (`rows`). What is known beforehand is kept on the
    host, so nothing in `advance` waits for the device.

    Attributes:
        state, plan, denoiser: the rows, and all that decides what becomes of them.
        step: what advances them.
        done: how many of its steps each row has done; on the host.
    """

    def __init__(
        self,
        state: SampleState,
        plan: SamplePlan,
        denoiser: Denoiser,
        step: Step,
        left: Int[Tensor, "B T"],
        guided: Bool[Tensor, "B S"],
        policies: Sequence[Any],
        done: Int[Tensor, " B"],
    ):
        """Args beyond the attributes, on the host.

        Args:
            left: how many tokens are masked before each step, and after the last.
            guided: which steps have guidance.
            policies: of each row.
        """
        self.state, self.plan, self.denoiser, self.step = state, plan, denoiser, step
        self.done = done
        self._left, self._guided, self._policies = left, guided, list(policies)
        self._leave = getattr(step, "by_row", False) and not denoiser.network.self_cond
        # rows with the most steps before them first, so that those that are not done are always the
        # first ones: all that is sent to a device is sent when rows come or go
        before = (left > 0).sum(dim=1) - done
        self._longest = before.argsort(descending=True, stable=True).to(state.ids.device)
        self._running: Any = (len(done), None)  # how many, and the views of them

    @classmethod
    def start(
        cls,
        denoiser: Denoiser,
        canvas: Int[Tensor, "B N"],
        options: SampleOptions,
        grid: tuple[int, int] | None = None,
        *,
        stream: str = "",
        step: Step = step,
    ) -> Sampling:
        """Before the first step; arguments as in `sample_tokens`."""
        network = denoiser.network
        if options.policy == "critic" and denoiser.critic is None:
            raise ValueError("policy 'critic' needs a model with a token critic: choose another")
        if options.policy is None and denoiser.critic is not None:
            options = options.replace(policy="critic")
        state = SampleState.start(canvas, network.mask_id)
        plan = make_plan(state.mask, options, grid, stream)
        if plan.top_k is not None and plan.top_k.max() > network.num_tokens:
            raise ValueError(
                f"top_k {plan.top_k.max()} is larger than the codebook's {network.num_tokens} codes"
            )
        asked = max(per_row(options.timesteps, len(canvas), "timesteps"))
        if asked > canvas.shape[1]:
            warnings.warn(
                f"timesteps {asked} exceed the {canvas.shape[1]} tokens of an image: "
                "sampling ends after one step per token",
                stacklevel=3,
            )
        left = torch.cat([(~plan.known).sum(1, keepdim=True), plan.num_masked], 1)
        rows = [options.policy] * len(canvas)
        done = torch.zeros(len(canvas), dtype=torch.long, device="cpu")
        on_device = plan.to(canvas.device)
        return cls(state, on_device, denoiser, step, left, plan.cond_scale != 1, rows, done)

    def __len__(self) -> int:
        return len(self.done)

    @property
    def finished(self) -> Bool[Tensor, " B"]:
        """Which rows are done; on the host."""
        return self._now(self._left) == 0

    def _now(self, by_step: Tensor) -> Tensor:
        """Each row's entry at the step that it is at."""
        at = self.done.clamp(max=by_step.shape[1] - 1)
        return by_step.gather(1, at[:, None])[:, 0]

    def advance(self) -> None:
        """One step more of every row that is not done."""
        running = ~self.finished
        count, self_cond = int(running.sum()), self.denoiser.network.self_cond
        if not count:
            return
        # with self-conditioning, each branch reads its own past: it is computed in every step
        guided = self._guided if self_cond else self._now(self._guided) & running
        how: dict[str, Any] = dict(guided=bool(guided.any()))
        how["num_logits"] = int(self._now(self._left).max())
        if count == len(self) or not self._leave:
            model = self.denoiser
            if self.step is plain_step and not self_cond and not self.done.any():
                # at first, pictures of one prompt differ in nothing but their noise
                model = model.once(self.state.ids, self.plan.cond_scale[:, 0], self.plan.left[:, 0])
            self.state = self.step(self.state, self.plan, model, **how)
        else:
            if count != self._running[0]:
                rows = self._longest[:count].sort().values
                views = rows, self.plan.rows(rows), self.denoiser.rows(rows)
                self._running = count, views
            rows, some, part = self._running[1]
            self.state = self.state.put(rows, self.step(self.state.rows(rows), some, part, **how))
        self.done = self.done + running

    def run(self, callback: Callback | None = None) -> bool:
        """Advance all rows to their ends, or until the callback returns True; whether it did."""
        while not bool(self.finished.all()):
            self.advance()
            if callback and callback(self.seen()):
                return True
        return False

    def seen(self, rows: slice = slice(None)) -> SampleStep:
        """What a callback sees, of all rows or of some."""
        state = self.state
        tensors = (state.ids, state.mask, state.scores, state.log_probs)
        return SampleStep(int(self.done[rows].max()), *(tensor[rows] for tensor in tensors))

    def rows(self, rows: Int[Tensor, " R"]) -> Sampling:
        """Some of the rows, by their places, alone.

        Args:
            rows: on the host.
        """
        at = rows.to(self.state.ids.device)
        left, guided = self._left[rows], self._guided[rows]
        steps = max(1, int((left > 0).sum(dim=1).max()))
        policies = [self._policies[row] for row in rows.tolist()]
        plan = self.plan.rows(at).lasting(steps).of(tuple(dict.fromkeys(policies)))
        state = self.state.rows(at)
        if state.hidden is not None and not guided.any():
            state = replace(state, hidden=state.hidden[:1])
        return Sampling(
            state,
            plan,
            self.denoiser.rows(at),
            self.step,
            left[:, : steps + 1],
            guided[:, :steps],
            policies,
            self.done[rows],
        )

    def cat(self, other: Sampling) -> Sampling:
        """Another's rows after these, of the same network and grid.

        Raises:
            ValueError: see `SamplePlan.cat`.
        """
        plan = self.plan.cat(other.plan)
        steps = plan.num_steps

        def joined(one: Tensor, two: Tensor, length: int) -> Tensor:
            pair = [F.pad(each, (0, length - each.shape[1])) for each in (one, two)]
            return torch.cat(pair)

        guided = joined(self._guided, other._guided, steps)
        return Sampling(
            self.state.cat(other.state, branches=2 if guided.any() else 1),
            plan,
            self.denoiser.cat(other.denoiser),
            self.step,
            joined(self._left, other._left, steps + 1),
            guided,
            self._policies + other._policies,
            torch.cat([self.done, other.done]),
        )


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
    sampling = Sampling.start(denoiser, canvas, options, grid, stream=stream, step=step)
    sampling.run(callback)
    return sampling.state.ids
