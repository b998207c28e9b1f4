"""Convolutions of large feature maps, a strip of rows at a time: the tokenizers' memory.

Every layer is computed whole before the next one, in strips that a processor's caches like, and
group norms take their statistics of the whole map beforehand. So there is no seam, only rounding
differs, and two maps of the widest resolution are all that is ever held, where PyTorch's modules
one after the other hold five. On a CPU it is faster, too (docs/speed.md).

Gradients need all of it anyway: where they are recorded, and in half precision and autocast, whose
statistics would be too coarse, the modules are called as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CPU_STRIP, STRIP = 2**21, 2**26  # numbers in a strip: 8 MB on a CPU, 256 MB elsewhere
LEAST_ROWS = 16  # of a strip: what two share is computed twice


def _rows(x: Tensor, per_row: int) -> int:
    """How many of a map's rows make a strip, of so many numbers a row; 0: it is not cut."""
    fine = x.dtype in (torch.float32, torch.float64)
    if torch.is_grad_enabled() or x.is_meta or not fine or torch.is_autocast_enabled(x.device.type):
        return 0
    rows = max(LEAST_ROWS, (CPU_STRIP if x.device.type == "cpu" else STRIP) // per_row)
    return rows if rows < x.shape[2] else 0


def norm_silu_conv(
    norm: nn.GroupNorm,
    conv: nn.Conv2d,
    x: Tensor,
    skip: Tensor | None = None,
    *,
    spare: bool = False,
) -> Tensor:
    """``conv(silu(norm(x)))``, plus what skips it, if anything.

    Args:
        norm: of x.
        conv: only those of 3 x 3, padded by 1, are computed in strips.
        x: (B, C, H, W).
        skip: of the result's shape.
        spare: whether the result may take the place of x in memory.
    """
    batch, channels, height, width = x.shape
    size = _rows(x, batch * width * max(channels, conv.out_channels))
    if not size or conv.kernel_size != (3, 3):
        y = conv(F.silu(norm(x)))
        return y if skip is None else skip + y
    scale, shift = _affine(norm, x)
    edge = x.new_zeros(batch, channels, 1, width)  # padding, after the activation
    out = x if spare and conv.in_channels == conv.out_channels else None
    above = edge
    for start in range(0, height, size):
        stop = min(start + size, height)
        # the row below belongs to the next strip, which computes it again
        seen = F.silu(torch.addcmul(shift, x[:, :, start : stop + 1], scale), inplace=True)
        rows = [above, seen] if stop < height else [above, seen, edge]
        above = seen[:, :, stop - start - 1 : stop - start].clone()
        y = F.conv2d(torch.cat(rows, dim=2), conv.weight, conv.bias, padding=(0, 1))
        if out is None:
            out = y.new_empty(batch, conv.out_channels, height, width)
        if skip is None:
            out[:, :, start:stop] = y
        else:
            torch.add(skip[:, :, start:stop], y, out=out[:, :, start:stop])
    assert out is not None
    return out


def _affine(norm: nn.GroupNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """A group norm of x as a factor and a summand of each channel."""
    groups = x.unflatten(1, (norm.num_groups, -1)).flatten(2)
    var, mean = torch.var_mean(groups, dim=2, correction=0)
    each = x.shape[1] // norm.num_groups
    scale = (var + norm.eps).rsqrt().repeat_interleave(each, dim=1) * norm.weight
    shift = norm.bias - mean.repeat_interleave(each, dim=1) * scale
    return scale[:, :, None, None], shift[:, :, None, None]


def in_strips(
    layer: Callable[[Tensor], Tensor], x: Tensor, channels: int, *, enlarged: int = 1, sees: int = 1
) -> Tensor:
    """A layer whose outputs depend on their surroundings alone, such as a convolution.

    Args:
        layer: pads its input itself.
        x: (B, C, H, W).
        channels: of the result.
        enlarged: rows of the result for each row of x.
        sees: rows above and below a row of x on which its results depend.
    """
    batch, _, height, width = x.shape
    size = _rows(x, batch * width * max(x.shape[1], channels * enlarged**2))
    if not size:
        return layer(x)
    out = x.new_empty(batch, channels, height * enlarged, width * enlarged)
    for start in range(0, height, size):
        stop, first = min(start + size, height), max(start - sees, 0)
        y = layer(x[:, :, first : stop + sees])
        out[:, :, start * enlarged : stop * enlarged] = y[
            :, :, (start - first) * enlarged : (stop - first) * enlarged
        ]
    return out
