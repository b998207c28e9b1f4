"""The cross-entropy of a linear head, in chunks: logits of some rows at a time, never of all.

At 262,144 codes the logits of a thousand masked tokens take a gigabyte, their softmax and gradient
two more, and a batch has many thousand. Here each chunk's logits are turned into its share of the
loss and of the gradients at once, and then given up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

TINY = 1e-12  # instead of no weight at all
ROWS = 512  # at a time on a CPU; the gradient of the weight is gone through once for each chunk


def cross_entropy(
    head: nn.Module,
    hidden: Float[Tensor, "R D"],
    labels: Int[Tensor, " R"],
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weights: Float[Tensor, " R"] | None = None,
) -> Float[Tensor, ""]:
    """``F.cross_entropy(head(hidden), labels)``, the mean over rows with a label, in float32.

    Args:
        head: in chunks if it is an ``nn.Linear`` without bias, or has a property ``whole``, the
            weight that it multiplies with; anything else (an adapter, say) gives all its logits.
        hidden: states of the rows.
        labels: codes in [0, V); negative where a row does not count.
        label_smoothing: share of the target that is spread over all codes.
        z_loss: adds so many times the mean squared log of softmax's denominator, which keeps
            logits from drifting (Chowdhery et al. 2022, 5).
        weights: of the rows in that mean, at least 0; all count alike by default. Where none
            counts the loss is 0.
    """
    weight: Any = getattr(head, "whole", None)
    if weight is None and type(head) is nn.Linear and head.bias is None:
        weight = head.weight
    if weight is None or not len(labels):
        logits = head(hidden).float()
        if weights is not None:
            each = F.cross_entropy(
                logits, labels, label_smoothing=label_smoothing, reduction="none"
            )
            if z_loss:
                each = each + z_loss * logits.logsumexp(-1).square()
            weights = weights * (labels >= 0)
            return (each * weights).sum() / weights.sum().clamp(min=TINY)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return loss + z_loss * logits.logsumexp(-1)[labels >= 0].square().mean() if z_loss else loss
    weights = (labels >= 0).float() if weights is None else weights * (labels >= 0)
    return _Chunked.apply(hidden, weight, labels, weights, label_smoothing, z_loss)  # type: ignore[return-value]


class _Chunked(torch.autograd.Function):
    """Gradients are computed on the way forward, where the logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        smoothing: float,
        z_loss: float,
    ) -> Tensor:
        codes = len(weight)
        size = ROWS if hidden.device.type == "cpu" else 8 * ROWS
        wants = [given.requires_grad for given in (hidden, weight)]
        by_hidden = torch.empty_like(hidden) if wants[0] else None
        by_weight = torch.zeros_like(weight) if wants[1] else None
        total = torch.zeros((), device=hidden.device)
        counts = weights > 0
        number = weights.sum().clamp(min=TINY)
        divisor = torch.where(counts, number / weights, torch.inf)
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            logits = F.linear(hidden[rows], weight)  # in autocast's type, where there is any
            dtype, logits = logits.dtype, logits.float()
            log_sum = logits.logsumexp(dim=-1, keepdim=True) if z_loss else None
            log_probs = logits.log_softmax(dim=-1)
            here, share = labels[rows, None].clamp(min=0), weights[rows, None]
            count = counts[rows, None]
            total -= (1 - smoothing) * (log_probs.gather(1, here) * share).masked_fill(
                ~count, 0
            ).sum()
            if smoothing:
                total -= smoothing / codes * (log_probs * share).masked_fill(~count, 0).sum()
            if log_sum is not None:
                total += z_loss * (log_sum.square() * share).masked_fill(~count, 0).sum()
            if not any(wants):
                continue
            # softmax minus target, of the mean over all rows that count
            slope = log_probs.exp_()
            if log_sum is not None:
                slope *= 1 + 2 * z_loss * log_sum
            slope -= smoothing / codes
            slope.scatter_add_(1, here, slope.new_full(here.shape, smoothing - 1))
            slope = slope.div_(divisor[rows, None]).to(dtype)
            if by_hidden is not None:
                by_hidden[rows] = (slope @ weight.to(dtype)).to(hidden.dtype)
            if by_weight is not None:
                by_weight += slope.T @ hidden[rows].to(dtype)
        ctx.save_for_backward(by_hidden, by_weight)
        return total / number

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [grad] = grads
        by_hidden, by_weight = ctx.saved_tensors
        return (
            None if by_hidden is None else by_hidden * grad.to(by_hidden.dtype),
            None if by_weight is None else by_weight * grad.to(by_weight.dtype),
            None,
            None,
            None,
            None,
        )
