"""What the sampler asks of a model: ids in, hidden states out, and a context that can be joined.

Anything that follows these two protocols can be sampled: our transformers, another project's
behind a few lines, a compiled or quantised one. A context holds whatever does not change over the
steps, one row per image, for each branch of the guidance: the first branch sees the text, the
second one none or the negative prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Context(Protocol):
    """What a network attends to: G branches of B rows."""

    def rows(self, rows: slice | Tensor) -> Self:
        """The same for some of the rows."""
        ...

    def branches(self, count: int) -> Self:
        """The first ``count`` branches alone."""
        ...

    def cat(self, other: Self) -> Self:
        """Another context's rows after these.

        The shorter text is padded. A context with fewer branches repeats its first one, which
        changes nothing for rows without guidance.
        """
        ...


class Network(Protocol):
    """A masked transformer, as the sampler sees it.

    Attributes:
        mask_id: the id that stands for "unknown" in the input.
        num_tokens: codebook size V.
        self_cond: whether it reads its previous pass's output as a third argument (None at first).
        partial: whether it also takes ``at``, the positions (B, K) whose hidden states are wanted,
            and gives those alone. May be missing, for no.
        timed: whether it also takes ``left``, how many steps of each row (B,) follow this one.
            May be missing, for no.
    """

    mask_id: int
    num_tokens: int
    self_cond: bool

    def __call__(
        self, ids: Int[Tensor, "B N"], context: Any, *self_cond: Any
    ) -> Float[Tensor, "G B N D"]:
        """Hidden states of all branches of the context, for the same ids."""
        ...

    def to_logits(self, hidden: Float[Tensor, "*s D"]) -> Float[Tensor, "*s V"]:
        """Must be linear (affine), since guidance is applied before it; else return logits above
        and leave them as they are here.
        """
        ...


@dataclass(frozen=True)
class Denoiser:
    """A network with its context, and a critic with its own, if any.

    A critic is a network whose ``to_logits`` gives one score, high where a token looks real.

    Attributes:
        at_once: rows of one pass; all by default. A CPU takes a quarter longer for each row of
            more than its caches hold.
        repeats: which rows have the context of the row before them.
        distinct: where only some rows are computed, and the others equal one of them: which ones,
            and for every row its place among them (`once`).
    """

    network: Any  # a Network; nn.Module's attributes cannot be typed
    context: Any
    critic: Any = None
    critic_context: Any = None
    at_once: int | None = None
    repeats: Bool[Tensor, " B"] | None = None
    distinct: tuple[Tensor, Tensor] | None = None

    def once(self, *inputs: Tensor) -> Denoiser:
        """The same, for a pass that computes rows that equal the one before only once.

        Args:
            *inputs: all that the pass depends on besides the context, one row each.
        """
        if self.repeats is None:
            return self
        repeats = self.repeats & same_as_before(*inputs)
        if not bool(repeats.any()):
            return self
        [rows] = (~repeats).nonzero(as_tuple=True)
        return replace(self, distinct=(rows, (~repeats).cumsum(0) - 1))

    def spread(self, x: Tensor) -> Tensor:
        """What `hidden` was computed for, or came of it, for all rows again."""
        return x if self.distinct is None else x[self.distinct[1]]

    def hidden(
        self,
        ids: Int[Tensor, "B N"],
        scale: Float[Tensor, " B"] | None,
        *self_cond: Any,
        at: Int[Tensor, "B K"] | None = None,
        left: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "r K D"], Float[Tensor, "G r K D"]]:
        """`guided_hidden` of the network; of the r distinct rows alone (`spread`)."""
        if self.distinct is not None:
            rows, _ = self.distinct
            some = [None if given is None else given[rows] for given in (scale, at, left)]
            part = self.rows(rows)
            return part.hidden(ids[rows], some[0], *self_cond, at=some[1], left=some[2])
        batch, size = len(ids), self.at_once or len(ids)
        if size >= batch:
            given = self.network, self.context, ids, scale, *self_cond
            return guided_hidden(*given, at=at, left=left)
        parts = []
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            past = [None if hidden is None else hidden[:, rows] for hidden in self_cond]
            some = [None if given is None else given[rows] for given in (scale, at, left)]
            given = self.network, self.context.rows(rows), ids[rows], some[0], *past
            parts.append(guided_hidden(*given, at=some[1], left=some[2]))
        guided, branches = zip(*parts, strict=True)
        return torch.cat(guided), torch.cat(branches, dim=1)

    def rows(self, rows: slice | Tensor) -> Denoiser:
        critic_context = self.critic and self.critic_context.rows(rows)
        return self._of(self.context.rows(rows), critic_context)

    def cat(self, other: Denoiser) -> Denoiser:
        assert self.network is other.network
        assert (self.critic is None) == (other.critic is None)
        critic_context = self.critic and self.critic_context.cat(other.critic_context)
        return self._of(self.context.cat(other.context), critic_context)

    def _of(self, context: Any, critic_context: Any) -> Denoiser:
        """The same for other rows."""
        return replace(
            self, context=context, critic_context=critic_context, repeats=None, distinct=None
        )


def same_as_before(*tensors: Tensor | None) -> Bool[Tensor, " B"]:
    """Which rows equal the one before, in all of the tensors."""
    equal = [(x[1:] == x[:-1]).reshape(len(x) - 1, -1).all(dim=1) for x in tensors if x is not None]
    return F.pad(torch.stack(equal).all(dim=0), (1, 0))


def guided_hidden(
    network: Any,
    context: Any,
    ids: Int[Tensor, "B N"],
    scale: Float[Tensor, " B"] | None,
    *self_cond: Any,
    at: Int[Tensor, "B K"] | None = None,
    left: Int[Tensor, " B"] | None = None,
) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "G B K D"]]:
    """``u + scale * (c - u)`` on hidden states: a linear head makes it the same on logits.

    Args:
        network: a `Network`.
        context: its context; both branches if there is a scale.
        ids: tokens, ``mask_id`` where unknown.
        scale: guidance of each row; None skips the second branch.
        *self_cond: the previous pass's output, if the network reads it.
        at: positions whose hidden states are wanted; all by default.
        left: how many steps of each row follow, for networks that read it.

    Returns:
        guided hidden states, exactly those of the first branch at scale 1; and every branch's.
    """
    context = context.branches(1 if scale is None else 2)
    timed = {"left": left} if left is not None and getattr(network, "timed", False) else {}
    if at is not None and getattr(network, "partial", False):
        hidden = network(ids, context, *self_cond, at=at, **timed)
    else:
        hidden = network(ids, context, *self_cond, **timed)
        if at is not None:
            hidden = hidden.gather(
                2, at[None, :, :, None].expand(len(hidden), -1, -1, hidden.shape[-1])
            )
    if scale is None:
        return hidden[0], hidden
    conditional, unconditional = hidden
    wide = torch.promote_types(hidden.dtype, torch.float32)  # small differences, made large
    guided = torch.lerp(unconditional.to(wide), conditional.to(wide), scale[:, None, None].to(wide))
    return guided.to(hidden.dtype), hidden
