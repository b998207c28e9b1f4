"""Sums and rows over all processes; on a single process each function returns what it is given."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def sum_over_processes(values: Tensor) -> Tensor:
    """Sum ``values`` over all processes, in place and without a gradient."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def mean_over_processes(rows: Float[Tensor, "n k"]) -> Float[Tensor, "k"]:
    """Mean over the rows of all processes, with the gradient that flows through it."""
    total = torch.cat([rows.sum(0), rows.new_tensor([len(rows)])])
    if world_size() > 1:
        from torch.distributed.nn.functional import all_reduce

        total = all_reduce(total)
    return total[:-1] / total[-1]


def gather_rows(rows: Float[Tensor, "n c"]) -> Float[Tensor, "m c"]:
    """Rows of all processes, in process order; processes may hold different numbers of rows."""
    if world_size() == 1:
        return rows
    counts = torch.zeros(world_size(), dtype=torch.long, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    padded = rows.new_zeros(int(counts.max()), rows.shape[1])
    padded[: len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(shares, padded)
    return torch.cat([share[:count] for share, count in zip(shares, counts.tolist(), strict=True)])
